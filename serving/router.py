"""Router: picks a replica for each request, in any region, by KV headroom and milliseconds.

All of its decisions are `routing.Dispatcher`'s, a state machine without a clock; this deployment
brings it the events (requests, load reports, Serve's running set, time) and carries the answers:
what can be said at once in the reply, what has to wait on each Ingress's one stream.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator

import msgspec

from serving import metrics
from serving.background import Background, collect_rarely, keep_freed_memory
from serving.config import RoutingConfig
from serving.direct_calls import Door, ray_tls
from serving.dispatcher import Answers, Dispatcher, DispatcherLimits
from serving.logs import configure as configure_logs
from serving.messages import DispatchUpdate, ReplicaReport, Route, RouteReply, RouteRequest, decode, encode
from serving.ray_compat import PinnedHandle, RayMeter, application_name, node_address, replica_id
from serving.transport import Outbox

TICK_S = 0.1


class RouterSetup(msgspec.Struct, frozen=True, kw_only=True):
    """What `app.compose` tells the Router."""

    routing: RoutingConfig
    block_tokens: int
    region: str  # where the Router stands
    deployments: tuple[str, ...]  # the ModelReplica deployments' names
    rtt_ms: dict[str, float]  # from here to each region
    egress_ms: dict[str, float]  # what an answer from there costs, in time of a replica
    log_level: str


class Router:
    """Made by Serve in the home region."""

    async def __init__(self, setup: RouterSetup) -> None:  # type: ignore[misc]  # Serve awaits it
        configure_logs(setup.log_level, replica=replica_id(), region=setup.region)
        self._meter = RayMeter(metrics.ROUTER_SERIES)
        limits = DispatcherLimits(
            max_waiting_requests=setup.routing.max_waiting_requests, max_wait_s=setup.routing.max_wait_s
        )
        self._dispatcher = Dispatcher(
            limits,
            setup.rtt_ms,
            block_tokens=setup.block_tokens,
            egress_ms=setup.egress_ms,
            home=setup.region,
            seed=secrets.randbits(32),
        )
        self._answers: Outbox[RouteReply] = Outbox()
        application = application_name()
        self._replicas = [PinnedHandle(deployment, application) for deployment in setup.deployments]
        self._background = Background()
        self._background.start(self._tick(), "tick")
        self._door = await Door.open(self, ("pick", "update", "report", "status"), node_address(), ray_tls())
        collect_rarely()
        keep_freed_memory()

    async def door(self) -> bytes:
        """Where the methods below are called, streams excepted: an encoded `direct_calls.Address`."""
        return self._door.address

    async def pick(self, payload: bytes) -> bytes:
        """A list of RouteRequest; one reply each, at once."""
        now = time.time()
        replies = [self._dispatcher.request(request, now) for request in decode(payload, list[RouteRequest])]
        for reply in replies:
            self._count(reply)
        return encode(replies)

    async def update(self, payload: bytes) -> None:
        """A list of DispatchUpdate: what became of earlier Routes."""
        now = time.time()
        for update in decode(payload, list[DispatchUpdate]):
            if update.outcome == "lost" and not update.request_id:  # a broken stream, not one request
                self._dispatcher.replica_lost(update.replica_id, now)
            self._publish(self._dispatcher.update(update, now))

    async def report(self, payload: bytes) -> bytes:
        """Reports of replicas; whether none of their news of blocks was missed, as an encoded bool."""
        now = time.time()
        is_whole = True
        for report in decode(payload, list[ReplicaReport]):
            load = report.load
            self._publish(self._dispatcher.replica_reported(load, now))
            for news in report.blocks:
                is_whole &= self._dispatcher.replica_events(load.replica_id, load.epoch, news, now)
        return encode(is_whole)

    async def routes(self, ingress_id: str) -> AsyncIterator[bytes]:
        """Answers to this Ingress's queued requests, for as long as it listens."""
        try:
            async for batch in self._answers.consume(ingress_id):
                yield encode(batch)
        finally:
            if not self._answers.is_attached(ingress_id):
                self._publish(self._dispatcher.ingress_gone(ingress_id, time.time()))

    async def status(self) -> bytes:
        """Replicas, headroom and what waits: an encoded `RouterStatus`."""
        return encode(self._dispatcher.status(time.time()))

    async def check_health(self) -> None:
        self._background.check()

    async def _tick(self) -> None:
        while True:
            now = time.time()
            running: set[str] = set().union(*(replicas.running() for replicas in self._replicas))
            self._publish(self._dispatcher.membership(running, now))
            self._publish(self._dispatcher.tick(now))
            self._meter.set(metrics.WAITING, self._dispatcher.num_waiting, {})
            self._meter.set(metrics.REPLICAS_KNOWN, len(running), {})
            await asyncio.sleep(TICK_S)

    def _publish(self, answers: Answers) -> None:
        for ingress_id, reply in answers:
            self._count(reply)
            self._answers.put(ingress_id, reply)

    def _count(self, reply: RouteReply) -> None:
        if isinstance(reply, Route):
            self._meter.add(metrics.ROUTER_PICKS, 1, {"region": reply.region})
