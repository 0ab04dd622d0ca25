"""Real replicas behind the production Ingress and Router, all on this machine, in real time.

    arrival ─► Generation ─► RouterLink ─► LocalRouter ─► Dispatcher
                   └───────► ReplicaLinks ─► pipe ─► a replica's process

What Serve carries in a cluster goes through calls and pipes here; the rest is the production's own.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from multiprocessing.connection import Connection

from serving.background import Background
from serving.bench.router.calibration_engine import Learned
from serving.bench.router.calibration_load import INGRESS, RealRequest
from serving.bench.router.calibration_pipe import Pipe
from serving.bench.router.calibration_replica import ModelFacts, ReplicaOptions, main
from serving.dispatcher import Answers
from serving.errors import ReplicaGone
from serving.messages import (
    DispatchUpdate,
    Queued,
    ReplicaReport,
    RouteReply,
    RouteRequest,
    decode,
    encode,
)
from serving.simulator import Policy
from serving.simulator.routers import TICK_S
from serving.transport import Outbox

END_S = 10.0  # for a process to end by itself

Serve = Callable[[Connection, bytes], None]
"""What a replica's process does; `calibration_replica.main` is the real one."""


class PipedReplicas:
    """Replicas behind pipes, as `ReplicaLinks` sees a deployment."""

    def __init__(self, connections: dict[str, Connection]) -> None:
        self.facts: dict[str, ModelFacts] = {}
        self.router: LocalRouter | None = None  # who hears the replicas' reports now
        self._frames: dict[str, Outbox[bytes]] = {name: Outbox() for name in connections}
        self._ready = asyncio.Event()
        self._ends: list[asyncio.Task[None]] = []
        self.pipes = {name: self._pipe(name, connection) for name, connection in connections.items()}

    async def ready(self) -> None:
        """Wait until every model is loaded. Raises ReplicaGone when a process ends before."""
        waiting = [asyncio.ensure_future(pipe.closed.wait()) for pipe in self.pipes.values()]
        waiting.append(asyncio.ensure_future(self._ready.wait()))
        _, pending = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        for wait in pending:
            wait.cancel()
        if not self._ready.is_set():
            raise ReplicaGone(next(name for name, pipe in self.pipes.items() if pipe.closed.is_set()))

    async def renew(self) -> dict[str, Learned]:
        """An empty engine for each that knows its steps; all that was recorded before it."""
        replies = await asyncio.gather(*(pipe.call("renew") for pipe in self.pipes.values()))
        return {name: decode(reply, Learned) for name, reply in zip(self.pipes, replies, strict=True)}

    async def rest(self) -> None:
        """Stop every engine: nothing is said any more that nobody would hear."""
        await asyncio.gather(*(pipe.call("rest") for pipe in self.pipes.values()))

    async def follow(self, requests: Sequence[RealRequest]) -> None:
        """Every request may come to any replica."""
        scripts = encode([request.script for request in requests])
        await asyncio.gather(*(pipe.call("script", scripts) for pipe in self.pipes.values()))

    def running(self) -> frozenset[str]:
        return frozenset(name for name, pipe in self.pipes.items() if not pipe.closed.is_set())

    async def call(self, replica_id: str, method: str, *args: object) -> bytes:
        payload = args[-1]
        return await self.pipes[replica_id].call(
            method, payload if isinstance(payload, bytes) else encode(payload)
        )

    async def stream(self, replica_id: str, method: str, *args: object) -> AsyncIterator[bytes]:
        async for batch in self._frames[replica_id].consume(INGRESS):
            if not batch:
                yield encode([])
            for payload in batch:
                yield payload
        raise ReplicaGone(replica_id)

    def close(self) -> None:
        for pipe in self.pipes.values():
            pipe.close()

    def _pipe(self, name: str, connection: Connection) -> Pipe:
        async def answer(method: str, payload: bytes) -> bytes:
            return await self._heard(name, method, payload)

        pipe = Pipe(connection, name, answer)
        self._ends.append(asyncio.create_task(self._end(name, pipe)))
        return pipe

    async def _heard(self, name: str, method: str, payload: bytes) -> bytes:
        if method == "frames":
            self._frames[name].put(INGRESS, payload)
        elif method == "report":
            return encode(True) if self.router is None else await self.router.call("report", payload)
        else:
            assert method == "ready"
            self.facts[name] = decode(payload, ModelFacts)
            if len(self.facts) == len(self._frames):
                self._ready.set()
        return b""

    async def _end(self, name: str, pipe: Pipe) -> None:
        await pipe.closed.wait()
        self._frames[name].close_all()


class LocalRouter:
    """The Router without Serve: a policy, fed in the order in which things come."""

    def __init__(self, policy: Policy, replicas: PipedReplicas) -> None:
        self._policy = policy
        self._replicas = replicas
        self._answers: Outbox[RouteReply] = Outbox()
        self.has_heard_all = asyncio.Event()  # replicas, of their loads
        self._unheard = set(replicas.running())
        self.queued: set[str] = set()  # ids of requests that had to wait here
        self._publish(policy.membership(set(replicas.running()), time.time()))
        self.background = Background()
        self.background.start(self._tick(), "tick")

    async def call(self, method: str, *args: object) -> bytes:
        (payload,) = args
        assert isinstance(payload, bytes)
        now = time.time()
        if method == "pick":
            return encode([self._pick(ask, now) for ask in decode(payload, list[RouteRequest])])
        if method == "update":
            for update in decode(payload, list[DispatchUpdate]):
                self._publish(self._policy.update(update, now))
            return b""
        assert method == "report"
        return encode(self._report(decode(payload, list[ReplicaReport]), now))

    async def stream(self, method: str, *args: object) -> AsyncIterator[bytes]:
        async for batch in self._answers.consume(INGRESS):
            yield encode(batch)

    def _pick(self, request: RouteRequest, now: float) -> RouteReply:
        reply = self._policy.request(request, now)
        if isinstance(reply, Queued):
            self.queued.add(request.request_id)
        return reply

    def _report(self, reports: list[ReplicaReport], now: float) -> bool:
        is_whole = True
        for report in reports:
            load = report.load
            self._unheard.discard(load.replica_id)
            self._publish(self._policy.replica_reported(load, now))
            for news in report.blocks:
                is_whole &= self._policy.replica_events(load.replica_id, load.epoch, news, now)
        if not self._unheard:
            self.has_heard_all.set()
        return is_whole

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            now = time.time()
            self._publish(self._policy.membership(set(self._replicas.running()), now))
            self._publish(self._policy.tick(now))

    def _publish(self, answers: Answers) -> None:
        for ingress_id, reply in answers:
            self._answers.put(ingress_id, reply)


@asynccontextmanager
async def started(options: Sequence[ReplicaOptions], serve: Serve = main) -> AsyncIterator[PipedReplicas]:
    """A process a replica, its model loaded; all are ended in the end."""
    context = multiprocessing.get_context("spawn")
    connections, processes = {}, []
    try:
        for option in options:
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(theirs, encode(option)), daemon=True)
            process.start()
            processes.append(process)
            theirs.close()
            connections[option.name] = ours
        replicas = PipedReplicas(connections)
        try:
            await replicas.ready()
            yield replicas
        finally:
            replicas.close()
    finally:
        for process in processes:
            process.join(END_S)
            if process.is_alive():
                process.kill()
                process.join()
