"""The replicas the Router knows: Serve's running set, joined with what replicas report. Pure.

A replica is a candidate when it is in both. Reports are ordered by (epoch, sequence).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Literal

import msgspec

from cluster.load import ReplicaLoad
from serving.dispatch_book import DispatchBook, Tally
from serving.messages import RouteRequest
from serving.routing import FleetLoad, ReplicaView, serves

UNLISTED_REGION_RTT_MS = 100.0
"""A region whose round trip nobody gave is taken to be far, so it is used last."""

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
    load: ReplicaLoad
    received_s: float
    last_routed: int = 0


class Fleet:
    def __init__(
        self, rtt_ms: Mapping[str, float], block_tokens: int, stale_after_s: float, drop_after_s: float
    ) -> None:
        """`rtt_ms` is the round trip from here to each region."""
        self._rtt_ms = rtt_ms
        self._block_tokens = block_tokens
        self._stale_after_s = stale_after_s
        self._drop_after_s = drop_after_s
        self._known: dict[str, _Known] = {}
        self._members: frozenset[str] = frozenset()
        self._num_routed = 0

    @property
    def members(self) -> frozenset[str]:
        return self._members

    def load(self, replica_id: str) -> ReplicaLoad | None:
        """Its last report, if there was one."""
        known = self._known.get(replica_id)
        return None if known is None else known.load

    def report(self, load: ReplicaLoad, now: float) -> bool:
        """Take a report; False when it is not newer than the last one."""
        known = self._known.get(load.replica_id)
        if known is not None and report_order(load) <= report_order(known.load):
            return False
        self._known[load.replica_id] = _Known(load, now, known.last_routed if known is not None else 0)
        return True

    def set_members(self, ids: AbstractSet[str]) -> frozenset[str]:
        """Take the running set; returns, and forgets, the replicas that left it."""
        left = self._members - ids
        for replica_id in left:
            self.forget(replica_id)
        self._members = frozenset(ids)
        return left

    def forget(self, replica_id: str) -> None:
        """No candidate until it reports again."""
        self._known.pop(replica_id, None)

    def forget_silent_strangers(self, now: float) -> None:
        """Reports may come before Serve names the replica; those it never names are let go."""
        for replica_id, known in list(self._known.items()):
            if replica_id not in self._members and now - known.received_s > self._drop_after_s:
                del self._known[replica_id]

    def routed(self, replica_id: str) -> None:
        self._num_routed += 1
        self._known[replica_id].last_routed = self._num_routed

    def serving(self, request: RouteRequest) -> set[str]:
        """Candidates that may serve this request, whatever room they have."""
        return {name for name, known in self._candidates() if serves(known.load, request)}

    def view(self, request: RouteRequest, book: DispatchBook, held: Collection[str], now: float) -> FleetLoad:
        """What `pick` is shown: the candidates that may serve this request."""
        views = tuple(
            self._view(known, book.tally(name), name in held, now)
            for name, known in self._candidates()
            if serves(known.load, request)
        )
        return FleetLoad(views, self._block_tokens, self._stale_after_s, self._drop_after_s)

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

    def _view(self, known: _Known, tally: Tally, held: bool, now: float) -> ReplicaView:
        return ReplicaView(
            load=known.load,
            rtt_ms=self._rtt_to(known.load.region),
            age_s=now - known.received_s,
            dispatched_blocks=tally.blocks,
            dispatched_tokens=tally.prompt_tokens,
            dispatched_requests=tally.num_counted,
            last_routed=known.last_routed,
            held=held,
        )

    def _rtt_to(self, region: str) -> float:
        return self._rtt_ms.get(region, UNLISTED_REGION_RTT_MS)

    def _freshness(self, known: _Known, now: float) -> Freshness:
        age_s = now - known.received_s
        if age_s > self._drop_after_s:
            return "silent"
        if known.load.draining:
            return "draining"
        return "doubted" if age_s > self._stale_after_s else "fresh"


def report_order(load: ReplicaLoad) -> tuple[int, int]:
    return (load.epoch, load.sequence)
