"""What was routed and how far each replica's own reports include it. Pure: time is passed in.

    SENT ──accepted──► ACCEPTED ──a report includes it, or TTL──► RUNNING ──finished──► gone
      │                    │                                         │
      ├── TTL: gone        │                                         │
      └────────────────────┴── refused, lost, its replica gone ──────┴──► RELEASED ──TTL──► gone

SENT and ACCEPTED are *counted*: their blocks and prompt tokens are added to the replica's own
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

    request_id: str
    ingress_id: str
    replica_id: str
    region: str
    tenant_key: str
    model: str
    blocks: int
    prompt_tokens: int  # those not expected to be cached
    expected_tokens: int  # of its answer
    charged: float  # service that its tenant was charged with, in tokens
    arrival: int  # its place among requests of equal priority
    state: State
    expires_s: float  # unix time; not used while RUNNING
    submission: int = 0


@dataclass(frozen=True, slots=True)
class Tally:
    """What is counted against one replica, and how many requests it has from us in all."""

    blocks: int = 0
    prompt_tokens: int = 0
    num_counted: int = 0
    num_in_flight: int = 0


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
        uncached_tokens: int,
        expected_tokens: int,
        charged: float,
        arrival: int,
        now: float,
    ) -> None:
        """Note a Route that is on its way to Ingress."""
        assert request.request_id not in self._dispatches, "take() the earlier dispatch first"
        self._put(
            Dispatch(
                request_id=request.request_id,
                ingress_id=request.ingress_id,
                replica_id=route.replica_id,
                region=route.region,
                tenant_key=request.tenant_key,
                model=request.model,
                blocks=route.reserve_blocks,
                prompt_tokens=uncached_tokens,
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

    def accepted(self, request_id: str, replica_id: str, submission: int, now: float) -> None:
        """The replica has numbered it. Ignored when the Route was forgotten or replaced."""
        dispatch = self._of(request_id, replica_id)
        if dispatch is not None and dispatch.state is State.SENT:
            self._put(
                replace(dispatch, state=State.ACCEPTED, submission=submission, expires_s=now + self._ttl_s)
            )

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
        if self.tally(replica_id).num_counted == 0:
            return
        for dispatch in [self._dispatches[request_id] for request_id in self._expiring]:
            accepted = dispatch.state is State.ACCEPTED and dispatch.replica_id == replica_id
            if accepted and dispatch.submission <= last_submission:
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
    counted = sign if dispatch.state in COUNTED else 0
    return Tally(
        blocks=tally.blocks + counted * dispatch.blocks,
        prompt_tokens=tally.prompt_tokens + counted * dispatch.prompt_tokens,
        num_counted=tally.num_counted + counted,
        num_in_flight=tally.num_in_flight + (sign if dispatch.state is not State.RELEASED else 0),
    )
