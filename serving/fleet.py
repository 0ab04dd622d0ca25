"""The replicas the Router knows: Serve's running set, joined with what replicas report. Pure.

A replica is a candidate when it is in both. Reports are ordered by (epoch, sequence). What of a
replica's figures does not depend on a request is worked out once a report or dispatch, into its row
of `routing.Replicas`; so a pick among many replicas is a few vector operations.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
import numpy as np

from cluster.load import ReplicaLoad, StepCoefficients
from serving.dispatch_book import Dispatch, DispatchBook, Tally
from serving.messages import Refusal, RouteRequest
from serving.rates import Rate
from serving.routing import Bools, Candidates, Replicas, Traffic

UNLISTED_REGION_RTT_MS = 100.0
"""A region whose round trip nobody gave is taken to be far, so it is used last."""

FEW_STEPS = 64
"""Timed steps after which a replica's own model is believed."""

MAX_LANES = 1024  # kinds of requests for which the candidates are remembered

Freshness = Literal["fresh", "doubted", "silent", "draining"]


class ReplicaStatus(msgspec.Struct, frozen=True, kw_only=True):
    load: ReplicaLoad
    state: Freshness
    age_s: float  # of its last report
    rtt_ms: float
    num_in_flight: int  # requests routed to it and not ended
    dispatched_blocks: int  # of them, what `load` does not include yet


@dataclass(slots=True)
class _Known:
    row: int
    load: ReplicaLoad
    received_s: float


class Fleet:
    def __init__(
        self,
        rtt_ms: Mapping[str, float],
        egress_ms: Mapping[str, float],
        stale_after_s: float,
        drop_after_s: float,
    ) -> None:
        """`rtt_ms` is the round trip from here to each region, `egress_ms` what leaving it costs."""
        self._rtt_ms = dict(rtt_ms)
        self._egress_ms = egress_ms
        self._stale_after_s = stale_after_s
        self._drop_after_s = drop_after_s
        self._known: dict[str, _Known] = {}
        self._members: frozenset[str] = frozenset()
        self._changed: set[str] = set()  # whose row is to be worked out again
        self._free_rows: list[int] = []
        self._replicas = _empty(0)
        self._received_s = np.zeros(0)
        self._is_member = np.zeros(0, dtype=np.bool_)
        self._is_draining = np.zeros(0, dtype=np.bool_)
        self._models: list[str] = []
        self._serving: dict[tuple[str, tuple[str, ...]], Bools] = {}  # of the present rows, as is:
        self._rows_in: dict[str, list[int]] = {}  # by region
        self._submissions = Rate()  # of all Routers, by the replicas' own numbers
        self._accepted = Rate()  # of this one's Routes
        self._work_ms = Rate()  # of the requests it routed
        self._prompt_blocks = Rate()
        self._matched_blocks = Rate()

    @property
    def members(self) -> frozenset[str]:
        return self._members

    @property
    def num_rows(self) -> int:
        return len(self._models)

    def load(self, replica_id: str) -> ReplicaLoad | None:
        """Its last report, if there was one."""
        known = self._known.get(replica_id)
        return None if known is None else known.load

    def row(self, replica_id: str) -> int | None:
        known = self._known.get(replica_id)
        return None if known is None else known.row

    def report(self, load: ReplicaLoad, now: float) -> bool:
        """Take a report; False when it is not newer than the last one."""
        known = self._known.get(load.replica_id)
        if known is None:
            known = self._known[load.replica_id] = _Known(self._take_row(load), load, now)
        elif report_order(load) <= report_order(known.load):
            return False
        elif load.epoch == known.load.epoch:
            self._submissions.add(load.last_submission - known.load.last_submission, now)
        known.load, known.received_s = load, now
        self._received_s[known.row] = now
        self._is_draining[known.row] = load.draining
        self._changed.add(load.replica_id)
        return True

    def refused(self, refusal: Refusal, now: float) -> None:
        """A replica said what it has left: believed until its next report."""
        known = self._known.get(refusal.replica_id)
        if known is None:
            return
        available = known.load.blocks_free + known.load.blocks_evictable
        known.load = msgspec.structs.replace(
            known.load,
            blocks_reserved=available - refusal.headroom_blocks,
            prefill_backlog_tokens=refusal.backlog_tokens,
        )
        known.received_s = self._received_s[known.row] = now
        self._changed.add(refusal.replica_id)

    def set_members(self, ids: AbstractSet[str]) -> frozenset[str]:
        """Take the running set; returns, and forgets, the replicas that left it."""
        if ids == self._members:
            return frozenset()
        left = self._members - ids
        for replica_id in left:
            self.forget(replica_id)
        self._members = frozenset(ids)
        for replica_id, known in self._known.items():
            self._is_member[known.row] = replica_id in self._members
        self._serving.clear()
        return left

    def forget(self, replica_id: str) -> None:
        """No candidate until it reports again."""
        known = self._known.pop(replica_id, None)
        if known is not None:
            self._replicas.ids[known.row] = None
            self._is_member[known.row] = False
            self._models[known.row] = ""
            self._free_rows.append(known.row)
            self._changed.discard(replica_id)
            self._forget_rows()

    def forget_silent_strangers(self, now: float) -> list[int]:
        """Reports may come before Serve names the replica; those it never names are let go. Their rows."""
        silent = [
            (name, known.row)
            for name, known in self._known.items()
            if name not in self._members and now - known.received_s > self._drop_after_s
        ]
        for name, _ in silent:
            self.forget(name)
        return [row for _, row in silent]

    def dispatch_changed(self, replica_id: str) -> None:
        """The book counts more or less against it than before."""
        if replica_id in self._known:
            self._changed.add(replica_id)

    def accepted(self, dispatch: Dispatch, now: float) -> None:
        """Learn of a request that was routed, and taken."""
        self._accepted.add(1, now)
        self._work_ms.add(dispatch.route.work_ms, now)
        self._prompt_blocks.add(dispatch.prompt_blocks, now)
        self._matched_blocks.add(dispatch.route.matched_blocks, now)

    def measured_rtt(self, region: str, rtt_ms: float) -> None:
        """Learn from a round trip that somebody measured, the replica's own delay included.

        So down is quick and up is slow: what is sought is the way, not the queues at its end.
        """
        known_ms = self._rtt_to(region)
        self._rtt_ms[region] = known_ms + (0.3 if rtt_ms < known_ms else 0.02) * (rtt_ms - known_ms)
        rows = self._rows_in.get(region)
        if rows is None:
            rows = [known.row for known in self._known.values() if known.load.region == region]
            self._rows_in[region] = rows
        self._replicas.rtt_ms[rows] = self._rtt_ms[region]

    def traffic(self, now: float) -> Traffic:
        """How busy the replicas are with prefill, and what of prompts they find cached."""
        accepted = self._accepted.per_s(now)
        mean_work_ms = self._work_ms.per_s(now) / accepted if accepted > 0 else 0.0
        submitted = max(accepted, self._submissions.per_s(now))
        prompt_blocks = self._prompt_blocks.per_s(now)
        return Traffic(
            busy=submitted * mean_work_ms / 1000 / max(1, len(self._members)),
            reuse=self._matched_blocks.per_s(now) / prompt_blocks if prompt_blocks > 0 else 0.0,
            mean_work_ms=mean_work_ms,
            others_per_s=max(0.0, submitted - accepted) / max(1, len(self._members)),
            per_replica_s=submitted / max(1, len(self._members)),
        )

    def serving(self, request: RouteRequest) -> Bools:
        """Candidates that may serve this request, whatever room they have: [R]."""
        lane = (request.model, request.allowed_regions)
        serves = self._serving.get(lane)
        if serves is None:
            if len(self._serving) >= MAX_LANES:
                self._serving.clear()
            allowed = [
                model == request.model and (not request.allowed_regions or region in request.allowed_regions)
                for model, region in zip(self._models, self._replicas.regions, strict=True)
            ]
            serves = self._serving[lane] = self._is_member & np.array(allowed, dtype=np.bool_)
        return serves

    def replicas(self, book: DispatchBook) -> Replicas:
        """Everybody's figures, as of their last reports and what was dispatched since."""
        for replica_id in self._changed:
            self._work_out(self._known[replica_id], book.tally(replica_id))
        self._changed.clear()
        return self._replicas

    def candidates(
        self, request: RouteRequest, serves: Bools, held: Bools | None, traffic: Traffic, now: float
    ) -> Candidates:
        """Who may take the request now. Call `replicas` before it."""
        age_s = np.maximum(0.0, now - self._received_s)
        is_open = serves & ~self._is_draining
        heard = is_open & (age_s <= self._drop_after_s)
        if heard.any():  # if nobody is, the fault lies with the news: to stop would be worse than to guess
            is_open = heard
        if held is not None:
            is_open &= ~held
        for refuser in request.refused_replicas:
            if (row := self.row(refuser)) is not None:
                is_open[row] = False
        known_ms = np.maximum(0.0, 1000 * (self._replicas.busy_until_s - now))
        # What other Routers have brought it since it told us is rare and long: little of it is over yet.
        brought = traffic.others_per_s * age_s
        return Candidates(
            serves=serves,
            is_open=is_open,
            is_doubted=age_s > self._stale_after_s,
            wait_ms=known_ms + brought * traffic.mean_work_ms,
            noise_ms=np.sqrt(brought) * traffic.mean_work_ms,
        )

    def loads(self, now: float) -> list[ReplicaLoad]:
        """The last reports of the candidates that are not silent, by replica id."""
        alive = [known.load for _, known in self._candidates() if self._freshness(known, now) != "silent"]
        return sorted(alive, key=lambda load: load.replica_id)

    def status(self, book: DispatchBook, now: float) -> tuple[ReplicaStatus, ...]:
        statuses = []
        for name, known in sorted(self._candidates(), key=lambda candidate: candidate[0]):
            tally = book.tally(name)
            status = ReplicaStatus(
                load=known.load,
                state=self._freshness(known, now),
                age_s=now - known.received_s,
                rtt_ms=self._rtt_to(known.load.region),
                num_in_flight=tally.num_in_flight,
                dispatched_blocks=tally.blocks,
            )
            statuses.append(status)
        return tuple(statuses)

    def _candidates(self) -> list[tuple[str, _Known]]:
        return [(name, known) for name, known in self._known.items() if name in self._members]

    def _rtt_to(self, region: str) -> float:
        return self._rtt_ms.get(region, UNLISTED_REGION_RTT_MS)

    def _freshness(self, known: _Known, now: float) -> Freshness:
        age_s = now - known.received_s
        if age_s > self._drop_after_s:
            return "silent"
        if known.load.draining:
            return "draining"
        return "doubted" if age_s > self._stale_after_s else "fresh"

    def _step_of(self, load: ReplicaLoad) -> StepCoefficients:
        """Its step-time model; of one that has hardly run yet, that of a like replica that has.

        A prior that errs on the slow side would else keep it from ever being tried.
        """
        if load.num_observations >= FEW_STEPS:
            return load.step
        like = (known.load for known in self._known.values() if known.load.model == load.model)
        most = max(like, key=lambda other: other.num_observations, default=load)
        return most.step if most.num_observations >= FEW_STEPS else load.step

    def _take_row(self, load: ReplicaLoad) -> int:
        if not self._free_rows:
            self._grow()
        row = self._free_rows.pop()
        self._replicas.ids[row] = load.replica_id
        self._replicas.regions[row] = load.region
        self._models[row] = load.model
        self._is_member[row] = load.replica_id in self._members
        self._forget_rows()
        return row

    def _forget_rows(self) -> None:
        self._serving.clear()
        self._rows_in.clear()

    def _grow(self) -> None:
        """By an eighth: every decision goes over the empty rows too."""
        size, more = self.num_rows, max(8, self.num_rows // 8)
        old, new = self._replicas, _empty(size + more)
        new.ids[:size], new.regions[:size] = old.ids, old.regions
        for name in _ARRAYS:
            getattr(new, name)[:size] = getattr(old, name)
        self._replicas = new
        self._received_s = np.concatenate((self._received_s, np.zeros(more)))
        self._is_member = np.concatenate((self._is_member, np.zeros(more, dtype=np.bool_)))
        self._is_draining = np.concatenate((self._is_draining, np.zeros(more, dtype=np.bool_)))
        self._models += [""] * more
        self._free_rows += range(size + more - 1, size - 1, -1)

    def _work_out(self, known: _Known, tally: Tally) -> None:
        """A replica's row, from its report and what was dispatched since."""
        load, row, replicas = known.load, known.row, self._replicas
        step = self._step_of(load)
        running = load.num_running + len(tally.counted)
        chunk = max(1, load.max_step_tokens - running)

        def step_ms(prefill_tokens: int) -> float:
            kv_tokens = load.decode_kv_tokens
            return step.predict_ms(running + prefill_tokens, kv_tokens, running, kv_tokens)

        decode_ms, chunk_ms = step_ms(0), step_ms(chunk)
        full, rest = divmod(load.prefill_backlog_tokens, chunk)
        under_way_ms = decode_ms if running else 0.0
        told_ms = under_way_ms + full * chunk_ms + (step_ms(rest) if rest else 0.0)
        busy_until_s = known.received_s + told_ms / 1000
        for dispatch in sorted(tally.counted, key=lambda counted: counted.sent_s):
            busy_until_s = max(busy_until_s, dispatch.sent_s) + dispatch.route.work_ms / 1000
        replicas.busy_until_s[row] = busy_until_s
        replicas.blocks_total[row] = load.blocks_total
        replicas.room_blocks[row] = load.room_blocks - tally.blocks
        replicas.free_blocks[row] = max(0, load.blocks_free - tally.blocks)
        replicas.token_ms[row] = chunk_ms / chunk
        replicas.step_ms[row] = decode_ms
        replicas.kv_token_ms[row] = step.per_kv_token_ms
        replicas.pair_ms[row] = step.per_pair_ms
        replicas.chunk_tokens[row] = chunk
        replicas.running[row] = running + load.num_waiting
        replicas.seats[row] = load.max_num_seqs
        replicas.rtt_ms[row] = self._rtt_to(load.region)
        replicas.egress_ms[row] = self._egress_ms.get(load.region, 0.0)


def report_order(load: ReplicaLoad) -> tuple[int, int]:
    return (load.epoch, load.sequence)


_INTEGERS = ("blocks_total", "room_blocks", "free_blocks", "chunk_tokens", "running", "seats")
_FLOATS = ("busy_until_s", "token_ms", "step_ms", "kv_token_ms", "pair_ms", "rtt_ms", "egress_ms")
_ARRAYS = (*_INTEGERS, *_FLOATS)


def _empty(size: int) -> Replicas:
    arrays: dict[str, Any] = {name: np.ones(size, dtype=np.int64) for name in _INTEGERS}  # some divide
    arrays |= {name: np.zeros(size) for name in _FLOATS}
    return Replicas(ids=[None] * size, regions=[""] * size, **arrays)
