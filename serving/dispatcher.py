"""The Router's state machine: what happened goes in, replies come out. Pure: time is passed in.

    report, membership ──► fleet ──┐
    block events ────────► index ──┤
    request ─────────────► queue ──┼──► pick ──► Route, Queued or Overloaded
    update, ingress_gone ► book ───┘  └──► lengths

A request is answered at once: Route, Overloaded or Queued. A queued one is answered once more, in
the list some later event returns with the Ingress each answer is for. Every event that may free
room returns such a list.

Order: priority, then the tenants' fair shares, then arrival. A waiting request *holds* every replica
that may serve it, so one with a later place gets a replica only where no earlier one could use it. A
refused request asks again and keeps its place; a refuser is tried again after its next report, if that
shows the room. Whoever is predicted to wait beyond its deadline is told so at once.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

import msgspec
import numpy as np

from cluster.load import ReplicaLoad
from serving.dispatch_book import Dispatch, DispatchBook, State
from serving.fleet import Fleet, ReplicaStatus, report_order
from serving.messages import (
    BlockEvents,
    BlockSnapshot,
    DispatchUpdate,
    Overloaded,
    Queued,
    Route,
    RouteReply,
    RouteRequest,
)
from serving.output_lengths import OutputLengths
from serving.prefix_index import PrefixIndex
from serving.region_records import RegionRecords, RegionStatus
from serving.routing import Bools, NoHeadroom, Prompt, drain_ms, pick
from serving.wait_queue import CACHED_WEIGHT, OUTPUT_WEIGHT, Waiting, WaitQueue

MIN_RETRY_AFTER_S = 1.0
REQUEST_BYTES = 512  # that a waiting request takes beside its hashes
HASH_BYTES = 64

Answers = list[tuple[str, RouteReply]]
"""Later answers to queued requests, each with the id of the Ingress that asked."""


@dataclass(frozen=True, slots=True)
class DispatcherLimits:
    max_waiting_requests: int = 1024
    max_waiting_bytes: int = 256 << 20
    max_wait_s: float = 30.0  # in the queue; a request's own deadline may be sooner
    dispatch_ttl_s: float = 5.0  # a Route nobody speaks of any more counts no longer than this
    stale_after_s: float = 3.0  # an older report is doubted: used when no fresh one has headroom
    drop_after_s: float = 10.0  # an older one is not used, while any replica is heard of


class RouterStatus(msgspec.Struct, frozen=True, kw_only=True):
    """What `searoom status` shows of the Router."""

    replicas: tuple[ReplicaStatus, ...]
    unreported: tuple[str, ...]  # in Serve's running set, and not heard of yet
    waiting: dict[str, int]  # requests a model
    regions: dict[str, RegionStatus]  # where something was routed to


class Dispatcher:
    def __init__(
        self,
        limits: DispatcherLimits,
        rtt_ms: Mapping[str, float],
        *,
        block_tokens: int,
        egress_ms: Mapping[str, float] | None = None,
        home: str = "",
        seed: int = 0,
    ) -> None:
        """`rtt_ms` is the round trip from here to each region, `egress_ms` the price of going there."""
        self._limits = limits
        self._block_tokens = block_tokens
        self._fleet = Fleet(rtt_ms, egress_ms or {}, limits.stale_after_s, limits.drop_after_s)
        self._index = PrefixIndex()
        self._lengths = OutputLengths()
        self._regions = RegionRecords(home)
        self._rng = random.Random(seed)
        self._book = DispatchBook(limits.dispatch_ttl_s)
        self._queue = WaitQueue()
        self._num_arrivals = 0

    @property
    def num_waiting(self) -> int:
        return len(self._queue)

    def request(self, request: RouteRequest, now: float) -> RouteReply:
        """Answer a new request, or one that was refused and asks again: its last Route is undone.

        Blocks which that undoing frees on the refuser reach others with its next report.
        """
        earlier = self._queue.remove(request.request_id) or self._undo(request)
        for refusal in request.refusals:
            self._fleet.refused(refusal, now)
        waiting = self._waiting(request, earlier.arrival if earlier else self._next_arrival(), now)
        if request.deadline_s <= now:
            return self._overloaded(waiting, "its deadline had passed when it came", now)
        answer = self._answer(waiting, self._held_before(waiting), now)
        if not isinstance(answer, NoHeadroom):
            return answer
        if earlier is None and self._is_full(waiting):
            return self._overloaded(
                waiting, f"{answer.why}, and {len(self._queue)} requests wait already", now
            )
        self._queue.add(waiting)
        queued = self._queued(waiting, now)
        # One that was routed before keeps its place: it was admitted, and then somebody was faster.
        if earlier is None and queued.predicted_wait_ms > 1000 * (request.deadline_s - now):
            self._queue.remove(request.request_id)
            why = (
                f"{answer.why}, and it would wait {queued.predicted_wait_ms / 1000:.1f} s, past its deadline"
            )
            return self._overloaded(waiting, why, now)
        return queued

    def replica_reported(self, load: ReplicaLoad, now: float) -> Answers:
        """Take a load report. One that is not newer than the last is ignored."""
        known = self._fleet.load(load.replica_id)
        if not self._fleet.report(load, now):
            return []
        if known is not None and load.epoch != known.epoch:  # a new process in its place
            self._forget_blocks(self._fleet.row(load.replica_id))
            self._replica_gone(load.replica_id, now)
        self._book.included(load.replica_id, load.last_submission)
        return self._advance(now)

    def replica_events(
        self, replica_id: str, epoch: int, news: BlockEvents | BlockSnapshot, now: float
    ) -> bool:
        """Take what a replica cached and evicted. False when some before is missing: a snapshot is due."""
        row = self._fleet.row(replica_id)
        return row is None or self._index.apply(row, epoch, news)

    def membership(self, ids: AbstractSet[str], now: float) -> Answers:
        """Take Serve's running set. A replica that left it is forgotten at once."""
        rows = {replica_id: self._fleet.row(replica_id) for replica_id in self._fleet.members - ids}
        for replica_id in self._fleet.set_members(ids):
            self._forget_blocks(rows[replica_id])
            self._book.replica_gone(replica_id, now)
        return self._advance(now)

    def replica_lost(self, replica_id: str, now: float) -> None:
        """Somebody found it dead before Serve did: no candidate until it reports again."""
        self._forget_blocks(self._fleet.row(replica_id))
        self._fleet.forget(replica_id)
        self._book.replica_gone(replica_id, now)

    def update(self, update: DispatchUpdate, now: float) -> Answers:
        """Take what became of a Route. Ignored when it speaks of an older Route than the last."""
        request_id, replica_id = update.request_id, update.replica_id
        if update.outcome == "accepted":
            accepted = self._book.accepted(request_id, replica_id, update.submission, now)
            if accepted is not None:
                self._fleet.accepted(accepted, now)
                self._regions.accepted(accepted.route.region)
            load = self._fleet.load(replica_id)
            if load is not None:
                self._book.included(replica_id, load.last_submission)
                if update.rtt_ms > 0:
                    self._fleet.measured_rtt(load.region, update.rtt_ms)
        elif update.outcome == "finished":
            ended = self._book.finished(request_id, replica_id)
            if ended is not None:
                self._lengths.observe(ended.model, ended.tenant_key, update.output_tokens, update.is_whole)
                more = update.output_tokens - ended.expected_tokens
                self._queue.served(ended.tenant_key, OUTPUT_WEIGHT * more)
                if update.ttft_ms > 0:
                    self._regions.first_token(ended.route.region, update.ttft_ms)
        else:
            self._book.released(request_id, replica_id, now)
        self._fleet.dispatch_changed(replica_id)
        return self._advance(now)

    def ingress_gone(self, ingress_id: str, now: float) -> Answers:
        """Forget an Ingress replica's waiting requests and dispatches; nobody is left to answer."""
        self._queue.ingress_gone(ingress_id)
        for replica_id in self._book.ingress_gone(ingress_id):
            self._fleet.dispatch_changed(replica_id)
        return self._advance(now)

    def tick(self, now: float) -> Answers:
        """Let time pass. Call it several times a second."""
        for replica_id in self._book.expire(now):
            self._fleet.dispatch_changed(replica_id)
        for row in self._fleet.forget_silent_strangers(now):
            self._forget_blocks(row)
        return self._advance(now)

    def loads(self, now: float) -> list[ReplicaLoad]:
        """The last reports of the running replicas that still report."""
        return self._fleet.loads(now)

    def status(self, now: float) -> RouterStatus:
        waiting: dict[str, int] = {}
        for entry in self._queue:
            waiting[entry.request.model] = waiting.get(entry.request.model, 0) + 1
        unheard = (name for name in sorted(self._fleet.members) if self._fleet.load(name) is None)
        return RouterStatus(
            replicas=self._fleet.status(self._book, now),
            unreported=tuple(unheard),
            waiting=waiting,
            regions=self._regions.status(),
        )

    def check_integrity(self) -> None:
        """No request both waits and is dispatched, and nothing is counted on a replica that left."""
        self._book.check_integrity()
        self._queue.check_integrity()
        self._index.check_integrity()
        waiting = {entry.request.request_id for entry in self._queue}
        for dispatch in self._book:
            assert dispatch.request_id not in waiting
            assert dispatch.state is State.RELEASED or dispatch.replica_id in self._fleet.members

    def _advance(self, now: float) -> Answers:
        """Answer every waiting request that can be answered now, in order."""
        answers: Answers = []
        for waiting in self._queue.expired(now):
            why = f"no replica had room within {now - waiting.since_s:.1f} s"
            answers.append((waiting.request.ingress_id, self._overloaded(waiting, why, now)))
        held: Bools | None = None
        lanes = {head.lane for head in self._queue.heads()}
        while lanes:
            # Looked for again each time: who was just served has moved back.
            waiting = min((self._queue.head(lane) for lane in lanes), key=self._queue.place)
            answer = self._answer(waiting, held, now)
            if isinstance(answer, NoHeadroom):
                serves = self._fleet.serving(waiting.request)
                held = serves if held is None else held | serves
                lanes.discard(waiting.lane)
                continue
            self._queue.remove(waiting.request.request_id)
            answers.append((waiting.request.ingress_id, answer))
            if waiting.lane not in self._queue:
                lanes.discard(waiting.lane)
        return answers

    def _answer(self, waiting: Waiting, held: Bools | None, now: float) -> Route | Overloaded | NoHeadroom:
        """Pick for this request; a Route is noted in the book."""
        still_refusing = tuple(
            replica_id
            for replica_id, report in waiting.refused_at.items()
            if (load := self._fleet.load(replica_id)) is not None and report_order(load) == report
        )
        request = waiting.request
        if still_refusing != request.refused_replicas:
            request = msgspec.structs.replace(request, refused_replicas=still_refusing)
        prompt = waiting.prompt
        traffic = self._fleet.traffic(now)
        replicas = self._fleet.replicas(self._book)
        serves = self._fleet.serving(request)
        candidates = self._fleet.candidates(request, serves, held, traffic, now)
        matched = self._index.match(request.block_hashes, self._fleet.num_rows, now)
        answer = pick(request, prompt, replicas, candidates, matched, traffic, self._rng)
        if isinstance(answer, Route):
            self._note(waiting, request, prompt, answer, now)
        return answer

    def _note(
        self, waiting: Waiting, request: RouteRequest, prompt: Prompt, route: Route, now: float
    ) -> None:
        """What a Route changes: it is booked, its blocks are expected, its tenant is charged."""
        cached_tokens = route.matched_blocks * self._block_tokens
        uncached_tokens = max(1, prompt.tokens - cached_tokens)
        charged = uncached_tokens + CACHED_WEIGHT * cached_tokens + OUTPUT_WEIGHT * prompt.new_tokens
        self._queue.served(request.tenant_key, charged)
        self._book.sent(request, route, prompt.new_tokens, charged, waiting.arrival, now)
        self._fleet.dispatch_changed(route.replica_id)
        row = self._fleet.row(route.replica_id)
        assert row is not None
        self._index.expect(row, request.block_hashes, now)

    def _undo(self, request: RouteRequest) -> Dispatch | None:
        """Take back what a Route changed, for a request that asks again."""
        earlier = self._book.take(request.request_id)
        if earlier is not None:
            self._queue.served(earlier.tenant_key, -earlier.charged)
            self._fleet.dispatch_changed(earlier.replica_id)
            if (row := self._fleet.row(earlier.replica_id)) is not None:
                self._index.withdraw(row, request.block_hashes)
        return earlier

    def _held_before(self, waiting: Waiting) -> Bools | None:
        """Replicas that some request with an earlier place waits for. Heads speak for their lanes."""
        if not len(self._queue):
            return None
        place = self._queue.place(waiting)
        earlier = [head for head in self._queue.heads() if self._queue.place(head) < place]
        return (
            np.logical_or.reduce([self._fleet.serving(head.request) for head in earlier]) if earlier else None
        )

    def _prompt(self, request: RouteRequest) -> Prompt:
        expected = self._lengths.expected(request.model, request.tenant_key, request.max_tokens)
        return Prompt(request.prompt_tokens, expected, self._block_tokens)

    def _waiting(self, request: RouteRequest, arrival: int, now: float) -> Waiting:
        refusers = ((name, self._fleet.load(name)) for name in request.refused_replicas)
        return Waiting(
            request=request,
            arrival=arrival,
            since_s=now,
            expires_s=min(request.deadline_s, now + self._limits.max_wait_s),
            prompt=self._prompt(request),
            num_bytes=REQUEST_BYTES + HASH_BYTES * len(request.block_hashes),
            refused_at={name: report_order(load) for name, load in refusers if load is not None},
        )

    def _is_full(self, waiting: Waiting) -> bool:
        too_many = len(self._queue) >= self._limits.max_waiting_requests
        return too_many or self._queue.num_bytes + waiting.num_bytes > self._limits.max_waiting_bytes

    def _replica_gone(self, replica_id: str, now: float) -> None:
        self._book.replica_gone(replica_id, now)
        self._fleet.dispatch_changed(replica_id)

    def _forget_blocks(self, row: int | None) -> None:
        if row is not None:
            self._index.forget(row)

    def _next_arrival(self) -> int:
        self._num_arrivals += 1
        return self._num_arrivals

    def _queued(self, waiting: Waiting, now: float) -> Queued:
        ahead, blocks_ahead = self._queue.ahead(waiting)
        wait_ms = self._drain_ms(waiting, blocks_ahead + waiting.prompt.demand_blocks, now)
        return Queued(
            request_id=waiting.request.request_id,
            position=ahead + 1,
            predicted_wait_ms=0.0 if wait_ms is None else wait_ms,
        )

    def _overloaded(self, waiting: Waiting, why: str, now: float) -> Overloaded:
        """Retry when what is before it, and it itself, has drained."""
        _, blocks_ahead = self._queue.ahead(waiting)
        wait_ms = self._drain_ms(waiting, blocks_ahead + waiting.prompt.demand_blocks, now)
        retry_after_s = self._limits.max_wait_s if wait_ms is None else wait_ms / 1000
        return Overloaded(
            request_id=waiting.request.request_id,
            retry_after_s=max(MIN_RETRY_AFTER_S, retry_after_s),
            why=why,
        )

    def _drain_ms(self, waiting: Waiting, blocks: int, now: float) -> float | None:
        request = msgspec.structs.replace(waiting.request, refused_replicas=())  # they release blocks too
        traffic = self._fleet.traffic(now)
        replicas = self._fleet.replicas(self._book)
        serves = self._fleet.serving(request)
        alive = self._fleet.candidates(request, serves, None, traffic, now).is_open
        return drain_ms(blocks, waiting.prompt.new_tokens, replicas, alive)
