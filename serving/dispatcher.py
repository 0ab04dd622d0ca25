"""The Router's state machine: what happened goes in, replies come out. Pure: time is passed in.

    report, membership ──► fleet ──┐
    request ─────────────► queue ──┼──► pick ──► Route, Queued or Overloaded
    update, ingress_gone ► book ───┘

A request is answered at once: Route, Overloaded or Queued. A queued one is answered once more, in
the list some later event returns with the Ingress each answer is for. Every event that may free
room returns such a list.

Order: priority, then arrival. A waiting request *holds* every replica that may serve it, so one
that arrived later gets a replica only where no earlier one could use it. A refused request asks
again and keeps its place; a refuser is tried again after its next report, if that shows the room.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from heapq import heappop, heappush

import msgspec

from cluster.load import ReplicaLoad
from serving.dispatch_book import DispatchBook, State
from serving.fleet import Fleet, ReplicaStatus, report_order
from serving.messages import DispatchUpdate, Overloaded, Queued, Route, RouteReply, RouteRequest
from serving.routing import NoHeadroom, demand_blocks, drain_ms, pick
from serving.wait_queue import Waiting, WaitQueue

MIN_RETRY_AFTER_S = 1.0
UNBOUNDED_POOL = 2**62

Answers = list[tuple[str, RouteReply]]
"""Later answers to queued requests, each with the id of the Ingress that asked."""


@dataclass(frozen=True, slots=True)
class DispatcherLimits:
    max_waiting_requests: int = 1024
    max_wait_s: float = 30.0  # in the queue; a request's own deadline may be sooner
    dispatch_ttl_s: float = 5.0  # a Route nobody speaks of any more counts no longer than this
    stale_after_s: float = 3.0  # see routing.FleetLoad
    drop_after_s: float = 10.0


class RouterStatus(msgspec.Struct, frozen=True, kw_only=True):
    """What `searoom status` shows of the Router."""

    replicas: tuple[ReplicaStatus, ...]
    unreported: tuple[str, ...]  # in Serve's running set, and not heard of yet
    waiting: dict[str, int]  # requests a model


class Dispatcher:
    def __init__(self, limits: DispatcherLimits, rtt_ms: Mapping[str, float], *, block_tokens: int) -> None:
        """`rtt_ms` is the round trip from here to each region."""
        self._limits = limits
        self._block_tokens = block_tokens
        self._fleet = Fleet(rtt_ms, block_tokens, limits.stale_after_s, limits.drop_after_s)
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
        earlier = self._queue.remove(request.request_id) or self._book.take(request.request_id)
        waiting = self._waiting(request, earlier.arrival if earlier else self._next_arrival(), now)
        if request.deadline_s <= now:
            return self._overloaded(waiting, "its deadline had passed when it came", now)
        answer = self._answer(waiting, self._held_before(waiting), now)
        if not isinstance(answer, NoHeadroom):
            return answer
        if earlier is None and len(self._queue) >= self._limits.max_waiting_requests:
            return self._overloaded(
                waiting, f"{answer.why}, and {len(self._queue)} requests wait already", now
            )
        self._queue.add(waiting)
        return self._queued(waiting, now)

    def replica_reported(self, load: ReplicaLoad, now: float) -> Answers:
        """Take a load report. One that is not newer than the last is ignored."""
        known = self._fleet.load(load.replica_id)
        if not self._fleet.report(load, now):
            return []
        if known is not None and load.epoch != known.epoch:
            self._book.replica_gone(load.replica_id, now)
        self._book.included(load.replica_id, load.last_submission)
        return self._advance(now)

    def membership(self, ids: AbstractSet[str], now: float) -> Answers:
        """Take Serve's running set. A replica that left it is forgotten at once."""
        for replica_id in self._fleet.set_members(ids):
            self._book.replica_gone(replica_id, now)
        return self._advance(now)

    def replica_lost(self, replica_id: str, now: float) -> None:
        """Somebody found it dead before Serve did: no candidate until it reports again."""
        self._fleet.forget(replica_id)
        self._book.replica_gone(replica_id, now)

    def update(self, update: DispatchUpdate, now: float) -> Answers:
        """Take what became of a Route. Ignored when it speaks of an older Route than the last."""
        request_id, replica_id = update.request_id, update.replica_id
        if update.outcome == "accepted":
            self._book.accepted(request_id, replica_id, update.submission, now)
            load = self._fleet.load(replica_id)
            if load is not None:
                self._book.included(replica_id, load.last_submission)
        elif update.outcome == "finished":
            self._book.finished(request_id, replica_id)
        else:
            self._book.released(request_id, replica_id, now)
        return self._advance(now)

    def ingress_gone(self, ingress_id: str, now: float) -> Answers:
        """Forget an Ingress replica's waiting requests and dispatches; nobody is left to answer."""
        self._queue.ingress_gone(ingress_id)
        self._book.ingress_gone(ingress_id)
        return self._advance(now)

    def tick(self, now: float) -> Answers:
        """Let time pass. Call it several times a second."""
        self._book.expire(now)
        self._fleet.forget_silent_strangers(now)
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
            replicas=self._fleet.status(self._book, now), unreported=tuple(unheard), waiting=waiting
        )

    def check_integrity(self) -> None:
        """No request both waits and is dispatched, and nothing is counted on a replica that left."""
        self._book.check_integrity()
        self._queue.check_integrity()
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
        heads = [(head.place, head.lane) for head in self._queue.heads()]
        held: set[str] = set()
        while heads:
            _, lane = heappop(heads)
            waiting = self._queue.head(lane)
            answer = self._answer(waiting, held, now)
            if isinstance(answer, NoHeadroom):
                held |= self._fleet.serving(waiting.request)
                continue
            self._queue.remove(waiting.request.request_id)
            answers.append((waiting.request.ingress_id, answer))
            if lane in self._queue:
                heappush(heads, (self._queue.head(lane).place, lane))
        return answers

    def _answer(self, waiting: Waiting, held: set[str], now: float) -> Route | Overloaded | NoHeadroom:
        """Pick for this request; a Route is noted in the book."""
        still_refusing = tuple(
            replica_id
            for replica_id, report in waiting.refused_at.items()
            if (load := self._fleet.load(replica_id)) is not None and report_order(load) == report
        )
        request = msgspec.structs.replace(waiting.request, refused_replicas=still_refusing)
        answer = pick(request, self._fleet.view(request, self._book, held, now))
        if isinstance(answer, Route):
            self._fleet.routed(answer.replica_id)
            self._book.sent(request, answer, waiting.arrival, now)
        return answer

    def _held_before(self, waiting: Waiting) -> set[str]:
        """Replicas that some request with an earlier place waits for. Heads speak for their lanes."""
        earlier = (head for head in self._queue.heads() if head.place < waiting.place)
        return set().union(*(self._fleet.serving(head.request) for head in earlier))

    def _waiting(self, request: RouteRequest, arrival: int, now: float) -> Waiting:
        refusers = ((name, self._fleet.load(name)) for name in request.refused_replicas)
        return Waiting(
            request=request,
            arrival=arrival,
            since_s=now,
            expires_s=min(request.deadline_s, now + self._limits.max_wait_s),
            blocks=demand_blocks(request, self._block_tokens, UNBOUNDED_POOL),
            refused_at={name: report_order(load) for name, load in refusers if load is not None},
        )

    def _next_arrival(self) -> int:
        self._num_arrivals += 1
        return self._num_arrivals

    def _queued(self, waiting: Waiting, now: float) -> Queued:
        ahead, blocks_ahead = self._queue.ahead(waiting.request.model, waiting.place)
        wait_ms = self._drain_ms(waiting, blocks_ahead + waiting.blocks, now)
        at_most_ms = 1000 * (waiting.expires_s - now)
        return Queued(
            request_id=waiting.request.request_id,
            position=ahead + 1,
            predicted_wait_ms=at_most_ms if wait_ms is None else min(wait_ms, at_most_ms),
        )

    def _overloaded(self, waiting: Waiting, why: str, now: float) -> Overloaded:
        """Retry when this model's queue, with this request at the end of its priority, has drained."""
        last = (waiting.request.priority, self._num_arrivals + 1)
        _, blocks_ahead = self._queue.ahead(waiting.request.model, last)
        wait_ms = self._drain_ms(waiting, blocks_ahead + waiting.blocks, now)
        retry_after_s = self._limits.max_wait_s if wait_ms is None else wait_ms / 1000
        return Overloaded(
            request_id=waiting.request.request_id,
            retry_after_s=max(MIN_RETRY_AFTER_S, retry_after_s),
            why=why,
        )

    def _drain_ms(self, waiting: Waiting, blocks: int, now: float) -> float | None:
        fleet = self._fleet.view(waiting.request, self._book, (), now)
        alive = [view for view in fleet.replicas if view.age_s <= fleet.drop_after_s]
        return drain_ms(blocks, waiting.request.expected_new_tokens, alive)
