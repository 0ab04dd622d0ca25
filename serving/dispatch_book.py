"""What was routed and how far each replica's own reports include it. Pure: time is passed in.

    SENT ──accepted──► ACCEPTED ──a report includes it, or TTL──► RUNNING ──finished──► gone
      │                    │                                         │
      ├── TTL: gone        │                                         │
      └────────────────────┴── refused, lost, its replica gone ──────┴──► RELEASED ──TTL──► gone

SENT and ACCEPTED are *counted*: their blocks and prefill work are added to the replica's own
figures, so a burst between two reports does not land on one replica. Counted once: a report whose
`last_submission` reaches the accepted number takes over. RELEASED counts nothing; it keeps the
request's place in the queue while its Ingress asks again. Every state but RUNNING ends by itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum

from serving.messages import Route, RouteRequest


class State(Enum):
    SENT = "sent"
    ACCEPTED = "accepted"
    RUNNING = "running"
    RELEASED = "released"


COUNTED = (State.SENT, State.ACCEPTED)


@dataclass(frozen=True, slots=True)
class Dispatch:
    """One request that was given a Route."""

    route: Route
    ingress_id: str
    tenant_key: str
    model: str
    prompt_blocks: int
    sent_s: float  # unix time
    expected_tokens: int  # of its answer
    charged: float  # service that its tenant was charged with, in tokens
    arrival: int  # its place among requests of equal priority
    state: State
    expires_s: float  # unix time; not used while RUNNING
    submission: int = 0

    @property
    def request_id(self) -> str:
        return self.route.request_id

    @property
    def replica_id(self) -> str:
        return self.route.replica_id


@dataclass(frozen=True, slots=True)
class Tally:
    """What is counted against one replica, and how many requests it has from us in all."""

    counted: tuple[Dispatch, ...] = ()
    num_in_flight: int = 0

    @property
    def blocks(self) -> int:
        return sum(dispatch.route.reserve_blocks for dispatch in self.counted)


class DispatchBook:
    def __init__(self, ttl_s: float) -> None:
        self._ttl_s = ttl_s
        self._dispatches: dict[str, Dispatch] = {}
        self._tallies: dict[str, Tally] = {}
        self._expiring: set[str] = set()  # every request that is not RUNNING

    def sent(
        self,
        request: RouteRequest,
        route: Route,
        expected_tokens: int,
        charged: float,
        arrival: int,
        now: float,
    ) -> None:
        """Note a Route that is on its way to Ingress."""
        assert request.request_id not in self._dispatches, "take() the earlier dispatch first"
        self._put(
            Dispatch(
                route=route,
                ingress_id=request.ingress_id,
                tenant_key=request.tenant_key,
                model=request.model,
                prompt_blocks=len(request.block_hashes),
                sent_s=now,
                expected_tokens=expected_tokens,
                charged=charged,
                arrival=arrival,
                state=State.SENT,
                expires_s=now + self._ttl_s,
            )
        )

    def take(self, request_id: str) -> Dispatch | None:
        """Forget and return the dispatch of a request that is asked for again, or has ended."""
        return self._drop(request_id)

    def accepted(self, request_id: str, replica_id: str, submission: int, now: float) -> Dispatch | None:
        """The replica has numbered it. None, and ignored, when the Route was forgotten or replaced."""
        dispatch = self._of(request_id, replica_id)
        if dispatch is None or dispatch.state is not State.SENT:
            return None
        accepted = replace(dispatch, state=State.ACCEPTED, submission=submission, expires_s=now + self._ttl_s)
        self._put(accepted)
        return accepted

    def released(self, request_id: str, replica_id: str, now: float) -> None:
        """The replica refused it or died; the request may be asked for again."""
        dispatch = self._of(request_id, replica_id)
        if dispatch is not None:
            self._put(replace(dispatch, state=State.RELEASED, expires_s=now + self._ttl_s))

    def finished(self, request_id: str, replica_id: str) -> Dispatch | None:
        """Forget and return it, if this was its last Route."""
        return self._drop(request_id) if self._of(request_id, replica_id) is not None else None

    def included(self, replica_id: str, last_submission: int) -> None:
        """A report of this replica includes submissions up to this number."""
        for dispatch in self.tally(replica_id).counted:
            if dispatch.state is State.ACCEPTED and dispatch.submission <= last_submission:
                self._put(replace(dispatch, state=State.RUNNING))

    def replica_gone(self, replica_id: str, now: float) -> None:
        """All it ran is released: those requests may be asked for again."""
        for dispatch in list(self._dispatches.values()):
            if dispatch.replica_id == replica_id and dispatch.state is not State.RELEASED:
                self._put(replace(dispatch, state=State.RELEASED, expires_s=now + self._ttl_s))

    def ingress_gone(self, ingress_id: str) -> set[str]:
        """Forget what it sent; returns the replicas against which less is counted now."""
        gone = [dispatch for dispatch in self._dispatches.values() if dispatch.ingress_id == ingress_id]
        for dispatch in gone:
            self._drop(dispatch.request_id)
        return {dispatch.replica_id for dispatch in gone}

    def expire(self, now: float) -> set[str]:
        """End what nobody spoke of for `ttl_s`: an accepted request is taken to be in the reports.

        Returns the replicas against which less is counted now.
        """
        over = [d for d in map(self._dispatches.__getitem__, self._expiring) if d.expires_s <= now]
        for dispatch in over:
            if dispatch.state is State.ACCEPTED:
                self._put(replace(dispatch, state=State.RUNNING))
            else:
                self._drop(dispatch.request_id)
        return {dispatch.replica_id for dispatch in over}

    def tally(self, replica_id: str) -> Tally:
        return self._tallies.get(replica_id, Tally())

    def check_integrity(self) -> None:
        """The running sums are those of the dispatches; only RUNNING ones have no end of their own."""
        sums: dict[str, Tally] = {}
        for dispatch in self._dispatches.values():
            sums[dispatch.replica_id] = _shifted(sums.get(dispatch.replica_id, Tally()), dispatch, +1)
        assert {name: tally for name, tally in sums.items() if tally != Tally()} == self._tallies
        expiring = {d.request_id for d in self._dispatches.values() if d.state is not State.RUNNING}
        assert expiring == self._expiring

    def __iter__(self) -> Iterator[Dispatch]:
        return iter(self._dispatches.values())

    def _of(self, request_id: str, replica_id: str) -> Dispatch | None:
        dispatch = self._dispatches.get(request_id)
        return dispatch if dispatch is not None and dispatch.replica_id == replica_id else None

    def _put(self, dispatch: Dispatch) -> None:
        self._drop(dispatch.request_id)
        self._dispatches[dispatch.request_id] = dispatch
        self._shift(dispatch, +1)
        if dispatch.state is not State.RUNNING:
            self._expiring.add(dispatch.request_id)

    def _drop(self, request_id: str) -> Dispatch | None:
        dispatch = self._dispatches.pop(request_id, None)
        if dispatch is not None:
            self._shift(dispatch, -1)
            self._expiring.discard(request_id)
        return dispatch

    def _shift(self, dispatch: Dispatch, sign: int) -> None:
        tally = _shifted(self.tally(dispatch.replica_id), dispatch, sign)
        if tally == Tally():
            self._tallies.pop(dispatch.replica_id, None)
        else:
            self._tallies[dispatch.replica_id] = tally


def _shifted(tally: Tally, dispatch: Dispatch, sign: int) -> Tally:
    counted = tuple(other for other in tally.counted if other.request_id != dispatch.request_id)
    if sign > 0 and dispatch.state in COUNTED:
        counted = (*counted, dispatch)
    return Tally(
        counted=counted,
        num_in_flight=tally.num_in_flight + (sign if dispatch.state is not State.RELEASED else 0),
    )
