"""The simulated Ingress: each request's way as `serving.generation` has it.

    ASKING ──Route──► SUBMITTED ──Accepted──► RUNNING ──► OVER
      │  ▲                │ Refused, lost         │ lost before its first token
      │  └────────────────┴──────────◄────────────┘
      └──Overloaded, deadline──► OVER

A message takes half a round trip. What Ingress would have to learn before it acts is looked up where
it is known, at the time at which it would act: only what others see is an event of its own.
"""

from __future__ import annotations

import math

from serving.engine.sequence import Sequence
from serving.generation import MAX_BUSY_REFUSALS, MAX_LOST_REPLICAS, ROUTER_RETRY_S
from serving.messages import (
    Accepted,
    DispatchUpdate,
    FinishReason,
    Overloaded,
    Queued,
    Refusal,
    Route,
    RouteReply,
)
from serving.simulator.agenda import Agenda
from serving.simulator.contract import DONE, LATE, LOST, REFUSED, SimSetup
from serving.simulator.engine import SimSequence
from serving.simulator.journey import Journey, route_request
from serving.simulator.replica import SimulatedReplica
from serving.simulator.routers import Routers, SimulatedRouter


class Journeys:
    """All requests' ways. It is told what replicas do by them, as their `ReplicaEvents`."""

    def __init__(
        self, setup: SimSetup, agenda: Agenda, routers: Routers, replicas: dict[str, SimulatedReplica]
    ) -> None:
        self.num_over = 0
        self.last_end_s = 0.0
        self._setup = setup
        self._agenda = agenda
        self._routers = routers
        self._replicas = replicas
        self._on_replica: dict[Sequence, Journey] = {}

    # ---- to the router and back -----------------------------------------------------------------

    def begin(self, journey: Journey) -> None:
        """A request arrives."""
        if journey.request.deadline_s < math.inf:
            self._agenda.at(journey.request.deadline_s, self._too_late, journey)
        self._ask(journey)

    def _ask(self, journey: Journey) -> None:
        if journey.is_over:
            return
        journey.attempt += 1
        journey.router = self._routers.serving(journey.request.number, journey.request.region)
        if journey.router is None:
            self._ask_again(journey, self._agenda.now + ROUTER_RETRY_S)
            return
        journey.was_routed = True
        self._agenda.at(self._agenda.now + self._hop_s(journey), self._at_router, journey, journey.router)

    def _at_router(self, journey: Journey, router: SimulatedRouter) -> None:
        now, attempt = self._agenda.now, journey.attempt
        if journey.is_over:
            return
        if not router.is_alive:
            self._ask_again(journey, now + self._hop_s(journey) + ROUTER_RETRY_S)
            return
        request = route_request(journey.request, journey.refused, journey.refusals)
        journey.refusals = ()
        router.ask(request, lambda reply: self._answered(journey, attempt, reply), now)

    def _answered(self, journey: Journey, attempt: int, reply: RouteReply | None) -> None:
        """The router speaks, or (None) has died before it did."""
        if journey.is_over or attempt != journey.attempt or isinstance(reply, Queued):
            return
        there_s = self._agenda.now + self._hop_s(journey)
        if reply is None:
            self._ask_again(journey, there_s + ROUTER_RETRY_S)
        elif isinstance(reply, Overloaded):
            journey.was_routed = False
            self._agenda.at(there_s, self._end, journey, REFUSED)
        else:
            self._submit(journey, reply, there_s)

    def _ask_again(self, journey: Journey, time_s: float) -> None:
        self._agenda.at(time_s, self._ask, journey)

    # ---- to a replica and back ------------------------------------------------------------------

    def _submit(self, journey: Journey, route: Route, from_s: float) -> None:
        """Send it to where it was routed, unless Ingress will have seen that one's streams break."""
        replica = self._replicas[route.replica_id]
        way_s = self._way_s(journey, replica)
        if replica.died_s is not None and replica.died_s + way_s <= from_s:
            self._without(journey, replica)
            self._ask_again(journey, from_s)
            return
        self._agenda.at(from_s + way_s, self._at_replica, journey, journey.attempt, replica, route)

    def _at_replica(self, journey: Journey, attempt: int, replica: SimulatedReplica, route: Route) -> None:
        if journey.is_over or attempt != journey.attempt:
            return
        now, way_s = self._agenda.now, self._way_s(journey, replica)
        journey.num_submits += 1
        if replica.died_s is not None:
            self._agenda.at(now + way_s, self._lose, journey, replica)
            return
        sequence = SimSequence.of(
            journey.request,
            f"{journey.request.number}#{journey.num_submits}",
            route.reserve_blocks,
            route.max_backlog_tokens if journey.busy < MAX_BUSY_REFUSALS else None,
            self._setup.block_tokens,
        )
        self._on_replica[sequence] = journey
        reply = replica.submit(sequence)
        if isinstance(reply, Accepted):
            journey.replica, journey.sequence = replica, sequence
            journey.was_routed = False
            journey.travel_s = 2 * self._hop_s(journey) + way_s
            self._tell_later(journey, now + way_s, "accepted", replica, submission=reply.submission)
            return
        del self._on_replica[sequence]
        if reply.permanent:
            self._agenda.at(now + way_s, self._end, journey, REFUSED)
            return
        journey.num_refusals += 1
        journey.refusals = (Refusal(replica.spec.name, reply.headroom_blocks, reply.backlog_tokens),)
        if reply.is_busy:
            journey.busy += 1
        else:
            self._without(journey, replica)
        self._ask_again(journey, now + way_s)

    def _lose(self, journey: Journey, replica: SimulatedReplica) -> None:
        """Its replica is gone: before its first token another one is tried."""
        if journey.is_over:
            return
        now = self._agenda.now
        journey.replica = None
        if journey.first_token_s <= now:
            self._tell_later(journey, now, "finished", replica)
            self._end(journey, LOST)
            return
        journey.num_lost += 1
        self._tell_later(journey, now, "lost", replica)
        self._without(journey, replica)
        if journey.num_lost >= MAX_LOST_REPLICAS:
            self._end(journey, LOST)
        else:
            self._ask(journey)

    # ---- what replicas do -----------------------------------------------------------------------

    def first_token(self, sequence: Sequence, now: float) -> None:
        journey = self._on_replica[sequence]
        assert journey.replica is not None and sequence.admitted_s is not None
        journey.first_token_s = now + self._way_s(journey, journey.replica)
        journey.queue_s = sequence.admitted_s - journey.request.arrival_s - journey.travel_s

    def ended(self, sequence: Sequence, reason: FinishReason, now: float) -> None:
        journey = self._on_replica.pop(sequence)
        journey.left(sequence)
        if reason == "abort":
            return  # by its own wish
        assert journey.replica is not None
        journey.last_token_s = now + self._way_s(journey, journey.replica)
        self._agenda.at(journey.last_token_s, self._finish, journey)

    def replica_died(self, replica: SimulatedReplica) -> None:
        for sequence in replica.die():
            journey = self._on_replica.pop(sequence)
            journey.left(sequence)
            if not journey.is_over:
                self._agenda.at(
                    self._agenda.now + self._way_s(journey, replica), self._lose, journey, replica
                )

    def router_died(self, number: int) -> None:
        for answer in self._routers.die(number):
            answer(None)

    # ---- the end --------------------------------------------------------------------------------

    def _finish(self, journey: Journey) -> None:
        if not journey.is_over:
            assert journey.replica is not None
            self._tell_later(journey, self._agenda.now, "finished", journey.replica)
            self._end(journey, DONE)

    def _too_late(self, journey: Journey) -> None:
        """Nobody waits any more: take it back from whoever has it."""
        if journey.is_over:
            return
        now = self._agenda.now
        if journey.was_routed and journey.router is not None:
            self._agenda.at(now + self._hop_s(journey), self._withdraw, journey, journey.router)
        if journey.replica is not None and journey.sequence is not None:
            self._tell_later(journey, now, "finished", journey.replica)
            there_s = now + self._way_s(journey, journey.replica)
            self._agenda.at(there_s, journey.replica.abort, journey.sequence.request_id)
        self._end(journey, LATE)

    def _withdraw(self, journey: Journey, router: SimulatedRouter) -> None:
        """It is asked for once more, with its deadline over, as `RouterLink.withdraw` does."""
        if router.is_alive:
            router.ask(route_request(journey.request), lambda reply: None, self._agenda.now)

    def _end(self, journey: Journey, outcome: int) -> None:
        """The one place where a request ends."""
        if journey.is_over:
            return
        journey.outcome = outcome
        self.num_over += 1
        self.last_end_s = self._agenda.now

    def _tell_later(
        self,
        journey: Journey,
        from_s: float,
        outcome: str,
        replica: SimulatedReplica,
        *,
        submission: int = 0,
    ) -> None:
        assert journey.router is not None
        update = DispatchUpdate(
            request_id=str(journey.request.number),
            replica_id=replica.spec.name,
            outcome=outcome,  # type: ignore[arg-type]
            submission=submission,
            output_tokens=journey.output_tokens if journey.sequence is None else journey.sequence.num_outputs,
        )
        self._agenda.at(from_s + self._hop_s(journey), self._at_router_told, journey.router, update)

    def _at_router_told(self, router: SimulatedRouter, update: DispatchUpdate) -> None:
        router.tell(update, self._agenda.now)

    # ---- distances ------------------------------------------------------------------------------

    def _without(self, journey: Journey, replica: SimulatedReplica) -> None:
        journey.refused = tuple(dict.fromkeys((*journey.refused, replica.spec.name)))

    def _hop_s(self, journey: Journey) -> float:
        """From the request's Ingress to its router."""
        assert journey.router is not None
        here, there = journey.request.region, journey.router.region
        between_s = self._setup.rtt_s(here, there) if here != there else 0.0
        return (self._setup.router_hop_ms / 1e3 + between_s) / 2

    def _way_s(self, journey: Journey, replica: SimulatedReplica) -> float:
        """From the request's Ingress to a replica."""
        return self._setup.rtt_s(journey.request.region, replica.spec.region) / 2
