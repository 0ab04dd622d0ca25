"""The neighbours of an Ingress in memory: replicas, and a Router that decides as the real one does."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing

import msgspec

from cluster.load import ReplicaLoad, StepCoefficients
from serving.completions import Completions, ModelIdentity
from serving.dispatcher import Answers, Dispatcher, DispatcherLimits
from serving.errors import ReplicaGone
from serving.links import ReplicaLinks
from serving.messages import (
    Accepted,
    DispatchUpdate,
    FinishReason,
    Refused,
    RouteReply,
    RouteRequest,
    SequenceDelta,
    SequenceTimes,
    StepFrame,
    Submit,
    SubmitReply,
    decode,
    encode,
)
from serving.router_link import RouterLink
from serving.transport import DelayLine, Outbox
from tests.serving.routing_cases import BLOCK_TOKENS, a_load

INGRESS = "ingress"
PATIENT = DispatcherLimits(max_wait_s=60.0)


class FakeReplica:
    """A ModelReplica in memory, with a pool of blocks it keeps like the real one.

    It accepts while its pool has room, and says what the test has it `say`. A test may make it
    refuse, stall before answering, or die.
    """

    def __init__(self, replica_id: str, blocks: int = 100) -> None:
        self.replica_id = replica_id
        self.blocks = blocks
        self.submits: list[Submit] = []
        self.running: dict[str, Submit] = {}
        self.aborts: list[str] = []
        self.refusals: list[Refused] = []  # answers to give before it decides by itself
        self.is_busy = False
        self.gate = asyncio.Event()  # clear: a submit is neither decided nor answered
        self.gate.set()
        self.answering = asyncio.Event()  # clear: it is decided, and its answer is on its way
        self.answering.set()
        self.dead = False
        self.script: Callable[[Submit], list[SequenceDelta]] = lambda submit: []
        self._num_reports = 0
        self._num_accepted = 0
        self._outbox: Outbox[StepFrame] = Outbox()

    @property
    def is_streaming(self) -> bool:
        """Whether an Ingress holds its stream of frames open."""
        return self._outbox.is_attached(INGRESS)

    def refuse(self, times: int = 1, *, permanent: bool = False) -> None:
        refusal = Refused(request_id="", headroom_blocks=0, why="no room", permanent=permanent)
        self.refusals += [refusal] * times

    def be_busy(self) -> None:
        """From now on refuse whoever was sent in the belief of a short backlog."""
        self.is_busy = True

    def say(self, request_id: str, *token_ids: int, finish: FinishReason | None = None) -> None:
        """One step's news of a request."""
        times = SequenceTimes(1.0, 2.0, 0)
        self.publish(
            SequenceDelta(request_id=request_id, token_ids=token_ids, finish_reason=finish, times=times)
        )

    def publish(self, *deltas: SequenceDelta) -> None:
        for delta in deltas:
            if delta.finish_reason is not None:
                self.running.pop(delta.request_id, None)
        self._outbox.put(INGRESS, StepFrame(step=1, deltas=deltas))

    def die(self) -> None:
        self.dead = True
        self.gate.set()
        self.answering.set()
        self._outbox.close_all()

    def load(self) -> ReplicaLoad:
        """A fresh report."""
        self._num_reports += 1
        reserved = sum(submit.reserve_blocks for submit in self.running.values())
        return a_load(
            self.replica_id,
            sequence=self._num_reports,
            last_submission=self._num_accepted,
            blocks_total=self.blocks,
            blocks_free=self.blocks,
            blocks_reserved=reserved,
            num_running=len(self.running),
        )

    async def submit(self, ingress_id: str, payload: bytes) -> bytes:
        submits = decode(payload, list[Submit])
        self.submits += submits
        await self.gate.wait()
        replies = [self._decide(submit) for submit in submits]
        await self.answering.wait()
        return encode(replies)

    async def abort(self, request_ids: list[str]) -> None:
        self.aborts += request_ids
        for request_id in request_ids:
            self.running.pop(request_id, None)

    async def frames(self, ingress_id: str) -> AsyncIterator[bytes]:
        async for batch in self._outbox.consume(ingress_id):
            yield encode(batch)

    def _decide(self, submit: Submit) -> SubmitReply:
        if self.refusals:
            return msgspec.structs.replace(self.refusals.pop(0), request_id=submit.request_id)
        if self.is_busy and submit.max_backlog_tokens is not None:
            return Refused(
                request_id=submit.request_id,
                headroom_blocks=self.blocks,
                backlog_tokens=100_000,
                why="busy",
                is_busy=True,
            )
        reserved = sum(one.reserve_blocks for one in self.running.values())
        if reserved + submit.reserve_blocks > self.blocks:
            room = self.blocks - reserved
            return Refused(request_id=submit.request_id, headroom_blocks=room, why="no room")
        self._num_accepted += 1
        self.running[submit.request_id] = submit
        if deltas := self.script(submit):
            self.publish(*deltas)
        return Accepted(
            request_id=submit.request_id,
            submission=self._num_accepted,
            reserved_blocks=submit.reserve_blocks,
            matched_blocks=0,
        )


class FakeReplicas:
    """`links.Replicas`: a deployment's replicas, all of which run until `leave` or a death."""

    def __init__(self, replicas: Sequence[FakeReplica]) -> None:
        self.all = {replica.replica_id: replica for replica in replicas}
        self.members = set(self.all)

    def running(self) -> frozenset[str]:
        return frozenset(self.members)

    async def call(self, replica_id: str, method: str, *args: object) -> bytes:
        replica = self._alive(replica_id)
        reply = await getattr(replica, method)(*args)
        self._alive(replica_id)
        return reply

    async def stream(self, replica_id: str, method: str, *args: object) -> AsyncIterator[bytes]:
        async with aclosing(getattr(self._alive(replica_id), method)(*args)) as items:
            async for item in items:
                yield item
        self._alive(replica_id)

    def _alive(self, replica_id: str) -> FakeReplica:
        replica = self.all[replica_id]
        if replica.dead:
            raise ReplicaGone(replica_id)
        return replica


class FakeRouter:
    """`links.Service`: the Router's own dispatcher behind the calls of the deployment."""

    def __init__(self, limits: DispatcherLimits) -> None:
        self.picks: list[RouteRequest] = []
        self.updates: list[DispatchUpdate] = []
        self.gate = asyncio.Event()  # clear: picks are taken, and their replies are held back
        self.gate.set()
        self._limits = limits
        self.start()

    def start(self) -> None:
        """A new Router, which knows nothing."""
        self.dead = False
        self.dispatcher = Dispatcher(self._limits, {"us-east": 0.0}, block_tokens=BLOCK_TOKENS)
        self._answers: Outbox[RouteReply] = Outbox()

    def die(self) -> None:
        self.dead = True
        self._answers.close_all()

    def know(self, *replicas: FakeReplica) -> None:
        """The running set is these, and each has just reported; the earlier it is named, the faster."""
        self._publish(self.dispatcher.membership({replica.replica_id for replica in replicas}, time.time()))
        for number, replica in enumerate(replicas):
            step = StepCoefficients(5.0 + 50.0 * number, 0.1, 0.0)
            load = msgspec.structs.replace(replica.load(), step=step)
            self._publish(self.dispatcher.replica_reported(load, time.time()))

    def tick(self) -> None:
        self._publish(self.dispatcher.tick(time.time()))

    def outcomes(self, request_id: str) -> list[tuple[str, str]]:
        """(outcome, replica) of every update on a request."""
        return [(one.outcome, one.replica_id) for one in self.updates if one.request_id == request_id]

    async def call(self, method: str, *args: object) -> bytes:
        if self.dead:
            raise ReplicaGone("Router")
        reply = await getattr(self, method)(*args)
        if self.dead:
            raise ReplicaGone("Router")
        return reply

    async def stream(self, method: str, *args: object) -> AsyncIterator[bytes]:
        if not self.dead:
            async with aclosing(getattr(self, method)(*args)) as items:
                async for item in items:
                    yield item
        if self.dead:
            raise ReplicaGone("Router")

    async def pick(self, payload: bytes) -> bytes:
        requests = decode(payload, list[RouteRequest])
        self.picks += requests
        replies = [self.dispatcher.request(request, time.time()) for request in requests]
        await self.gate.wait()
        return encode(replies)

    async def update(self, payload: bytes) -> bytes:
        for update in decode(payload, list[DispatchUpdate]):
            self.updates.append(update)
            if update.outcome == "lost" and not update.request_id:
                self.dispatcher.replica_lost(update.replica_id, time.time())
            self._publish(self.dispatcher.update(update, time.time()))
        return b""

    async def routes(self, ingress_id: str) -> AsyncIterator[bytes]:
        async for batch in self._answers.consume(ingress_id):
            yield encode(batch)

    def _publish(self, answers: Answers) -> None:
        for ingress_id, reply in answers:
            self._answers.put(ingress_id, reply)


class FakeFleet:
    """An Ingress's real links, to replicas and a Router in memory. Use as an async context."""

    def __init__(self, *replicas: FakeReplica, limits: DispatcherLimits = PATIENT) -> None:
        self.replicas = FakeReplicas(replicas)
        self.router = FakeRouter(limits)
        self.router.know(*replicas)
        self.lost: list[str] = []

    async def __aenter__(self) -> FakeFleet:
        self.links = ReplicaLinks(
            {"us-east": (self.replicas, DelayLine(0.0))}, INGRESS, on_lost=self.lost.append
        )
        self.router_link = RouterLink(self.router, INGRESS)
        await eventually(lambda: all(one.is_streaming or one.dead for one in self.replicas.all.values()))
        return self

    async def __aexit__(self, *error: object) -> None:
        self.links.close()
        self.router_link.close()
        self.router.dispatcher.check_integrity()

    def completions(self, timeout_s: float = 5.0) -> Completions:
        identity = ModelIdentity("m", "weights-1", "float32", BLOCK_TOKENS)
        return Completions(identity, self.router_link, self.links, ingress_id=INGRESS, timeout_s=timeout_s)

    @property
    def num_held(self) -> int:
        """Requests the Router still has on its books, waiting or dispatched."""
        status = self.router.dispatcher.status(time.time())
        return sum(status.waiting.values()) + sum(one.num_in_flight for one in status.replicas)


async def eventually(condition: Callable[[], object], timeout_s: float = 3.0) -> None:
    """Wait until `condition` holds."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 (conditions are of plain objects, which tell nobody)
            await asyncio.sleep(0.002)
