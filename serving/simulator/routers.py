"""The simulated routers, and the way of the replicas' news to them.

Every router hears every replica, half a round trip and the staleness after it spoke; nobody hears
routers but who asks them. A router that missed block events asks their replica for a snapshot.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

from cluster.load import ReplicaLoad
from serving.messages import BlockEvents, BlockSnapshot, DispatchUpdate, Queued, RouteReply, RouteRequest
from serving.simulator.agenda import Agenda
from serving.simulator.contract import MakePolicy, Policy, SimSetup
from serving.simulator.replica import SimulatedReplica
from serving.simulator.reports import EPOCH

TICK_S = 0.1


@runtime_checkable
class AllSeeing(Protocol):
    """A policy, of an oracle, that is shown the replicas themselves before anything happens."""

    def behold(self, replicas: Sequence[SimulatedReplica]) -> None: ...


Answer = Callable[[RouteReply | None], None]
"""What a reply does; None says that none will come, for the router died."""


class SimulatedRouter:
    """One policy, and who waits for its later answers."""

    def __init__(self, number: int, region: str, policy: Policy) -> None:
        self.number = number
        self.region = region
        self.policy = policy
        self.is_alive = True
        self.waiting: dict[str, Answer] = {}  # by request id
        self.awaited_snapshots: set[str] = set()  # of which replicas

    def ask(self, request: RouteRequest, answer: Answer, now: float) -> None:
        """`answer` is called now and, after a Queued, once more, unless the router dies first."""
        self.waiting.pop(request.request_id, None)
        reply = self.policy.request(request, now)
        if isinstance(reply, Queued):
            self.waiting[request.request_id] = answer
        answer(reply)

    def tell(self, update: DispatchUpdate, now: float) -> None:
        if self.is_alive:
            self.publish(self.policy.update(update, now))

    def publish(self, answers: list[tuple[str, RouteReply]]) -> None:
        for _, reply in answers:
            answer = self.waiting.pop(reply.request_id, None)
            if answer is not None:  # else it was withdrawn
                answer(reply)


class Routers:
    def __init__(self, setup: SimSetup, make_policy: MakePolicy, agenda: Agenda) -> None:
        home = setup.replicas[0].region
        regions = setup.router_regions or (home,) * setup.num_routers
        assert len(regions) == setup.num_routers, "router_regions names one region a router"
        self.all = [SimulatedRouter(n, regions[n], make_policy(n, setup)) for n in range(setup.num_routers)]
        self.num_reports = self.num_block_events = self.num_snapshots = 0
        self._setup = setup
        self._agenda = agenda
        self._in_region = {
            region: [router for router in self.all if router.region == region] for region in set(regions)
        }

    def start(self, replicas: list[SimulatedReplica]) -> None:
        """Everybody knows all replicas and has heard them once."""
        first = [replica.report_first() for replica in replicas]
        ids = {replica.spec.name for replica in replicas}
        for router in self.all:
            if isinstance(router.policy, AllSeeing):
                router.policy.behold(replicas)
            router.publish(router.policy.membership(ids, 0.0))
            for load in first:
                router.publish(router.policy.replica_reported(load, 0.0))
        self._agenda.at(TICK_S, self._tick)

    def serving(self, number: int, region: str) -> SimulatedRouter | None:
        """Whom a request of this number and region asks: the next one where that one is dead."""
        for routers in (self._in_region.get(region, self.all), self.all):
            start = number % len(routers)
            for router in (*routers[start:], *routers[:start]):
                if router.is_alive:
                    return router
        return None

    def die(self, number: int) -> list[Answer]:
        """A router's death; returns whose answers will never come."""
        router = self.all[number]
        router.is_alive = False
        lost = list(router.waiting.values())
        router.waiting.clear()
        return lost

    def set_members(self, ids: set[str]) -> None:
        for router in self.all:
            if router.is_alive:
                router.publish(router.policy.membership(ids, self._agenda.now))

    def reported(self, replica: SimulatedReplica, load: ReplicaLoad, news: BlockEvents | None) -> None:
        """A replica speaks; send it to every router."""
        self.num_reports += 1
        self.num_block_events += len(news.events) if news else 0
        for region, routers in self._in_region.items():
            self._agenda.at(self._arrival_s(replica, region), self._hear, routers, replica, load, news)

    def _hear(
        self,
        routers: list[SimulatedRouter],
        replica: SimulatedReplica,
        load: ReplicaLoad,
        news: BlockEvents | None,
    ) -> None:
        now = self._agenda.now
        for router in routers:
            if not router.is_alive:
                continue
            if news is not None:
                self._hear_blocks(router, replica, news)
            router.publish(router.policy.replica_reported(load, now))

    def _hear_blocks(self, router: SimulatedRouter, replica: SimulatedReplica, news: BlockEvents) -> None:
        name, now = replica.spec.name, self._agenda.now
        is_complete = router.policy.replica_events(name, EPOCH, news, now)
        if not is_complete and name not in router.awaited_snapshots:
            router.awaited_snapshots.add(name)
            there_s = now + self._setup.rtt_s(replica.spec.region, router.region) / 2
            self._agenda.at(there_s, self._send_snapshot, router, replica)

    def _send_snapshot(self, router: SimulatedRouter, replica: SimulatedReplica) -> None:
        if replica.died_s is None and not self._agenda.is_closing:
            self.num_snapshots += 1
            snapshot = replica.snapshot()
            there_s = self._arrival_s(replica, router.region)
            self._agenda.at(there_s, self._hear_snapshot, router, replica, snapshot)

    def _hear_snapshot(
        self, router: SimulatedRouter, replica: SimulatedReplica, snapshot: BlockSnapshot
    ) -> None:
        router.awaited_snapshots.discard(replica.spec.name)
        if router.is_alive:
            router.policy.replica_events(replica.spec.name, EPOCH, snapshot, self._agenda.now)

    def _arrival_s(self, replica: SimulatedReplica, region: str) -> float:
        delay_s = self._setup.rtt_s(replica.spec.region, region) / 2 + self._setup.staleness_ms / 1e3
        return self._agenda.now + delay_s

    def _tick(self) -> None:
        if self._agenda.is_closing:
            return
        for router in self.all:
            if router.is_alive:
                router.publish(router.policy.tick(self._agenda.now))
        self._agenda.at(self._agenda.now + TICK_S, self._tick)
