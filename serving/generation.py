"""One request's way from a prompt to its tokens: pick, submit, follow the stream, settle.

A refusal leads to another pick, never to an error while another replica has room. A replica that
dies before the first token is answered by one more pick; after it the stream ends with an error.
However it ends, the request is settled once, in `run`'s `finally`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec

from serving.errors import (
    ApiError,
    ContextLengthExceeded,
    DeadlineExceeded,
    InternalError,
    ReplicaGone,
    ReplicaLost,
    ServerOverloaded,
)
from serving.links import ReplicaLink, ReplicaLinks
from serving.messages import (
    Accepted,
    DispatchUpdate,
    FinishReason,
    Overloaded,
    Refusal,
    Refused,
    Route,
    RouteRequest,
    SequenceDelta,
    SequenceTimes,
    Submit,
)
from serving.router_link import RouterLink

ROUTER_RETRY_S = 0.1
REPLICA_DIED = "the model replica that served this request died; send it again"
SUBMIT_PATIENCE_S = 5.0  # a live replica answers between two steps
MAX_BUSY_REFUSALS = 4  # then it is served wherever the Router says: who asks for ever is never served
MAX_LOST_REPLICAS = 2  # a request whose replicas keep dying may be what kills them


@dataclass
class GenerationTimes:
    """Unix times of a request's hops; `sequence` is what the replica says of its own part."""

    began_s: float = 0.0
    picked_s: float = 0.0
    accepted_s: float = 0.0
    first_token_s: float = 0.0
    ended_s: float = 0.0
    sequence: SequenceTimes | None = None


@dataclass
class Generation:
    """A request under way. `run` yields its deltas; the other fields tell how it went."""

    request: RouteRequest
    submit: Submit
    router: RouterLink
    links: ReplicaLinks
    output_tokens: int = 0
    finish_reason: FinishReason | None = None
    refusals: int = 0
    route: Route | None = None
    times: GenerationTimes = field(default_factory=GenerationTimes)
    _link: ReplicaLink | None = None
    _num_submits: int = 0
    _num_lost: int = 0
    _num_busy: int = 0
    _is_routing: bool = False  # the Router may hold it, queued or routed, and no replica has taken it

    async def run(self) -> AsyncGenerator[SequenceDelta]:
        """Deltas until one carries a finish reason. Closing it early aborts the request.

        Raises ServerOverloaded, ContextLengthExceeded, DeadlineExceeded before the first delta;
        ReplicaLost or InternalError at any time.
        """
        self.times.began_s = time.time()
        try:
            while True:
                await self._place()
                async for delta in self._follow():
                    yield delta
                if self.finish_reason is not None:
                    return
                if self.output_tokens:
                    raise ReplicaLost(REPLICA_DIED)
                self._lose_replica()
        finally:
            self._settle()

    async def _place(self) -> None:
        """Find a replica that accepts the request within its deadline."""
        try:
            async with asyncio.timeout(self.request.deadline_s - time.time()):
                while self._link is None:
                    await self._try(await self._pick())
        except TimeoutError as late:
            raise DeadlineExceeded("no replica took the request within its deadline") from late

    async def _try(self, route: Route) -> None:
        """Submit to the replica the Router picked."""
        self.times.picked_s = time.time()
        try:
            link = self.links.get(route.replica_id)
        except ReplicaGone:  # not seen here yet, or gone, which its link has told the Router
            self._without(route.replica_id)
            return
        self._num_submits += 1
        is_choosy = self._num_busy < MAX_BUSY_REFUSALS
        submit = msgspec.structs.replace(
            self.submit,
            request_id=self._submit_id,
            reserve_blocks=route.reserve_blocks,
            max_backlog_tokens=route.max_backlog_tokens if is_choosy else None,
        )
        try:
            async with asyncio.timeout(SUBMIT_PATIENCE_S) as patience:
                reply = await link.submit(submit)
        except ReplicaGone:
            self._lose_replica(route)
            return
        except TimeoutError:
            if not patience.expired():
                raise  # the request's own deadline
            self._tell_lost(route)  # alive or not, it does not answer: what it may accept later is aborted
            self._without(route.replica_id)
            return
        if isinstance(reply, Accepted):
            self.route, self._link, self._is_routing = route, link, False
            self.times.accepted_s = time.time()
            rtt_ms = 1000 * (self.times.accepted_s - self.times.picked_s)
            self._tell("accepted", submission=reply.submission, rtt_ms=rtt_ms)
            return
        link.release(self._submit_id, abort=False)
        self._refused(route, reply)

    async def _pick(self) -> Route:
        self._is_routing = True
        while True:
            try:
                reply = await self.router.pick(self.request)
            except ReplicaGone:  # a new Router is starting: pick waits until its stream is attached
                await asyncio.sleep(ROUTER_RETRY_S)
                continue
            self.request = msgspec.structs.replace(self.request, refusals=())
            if isinstance(reply, Route):
                return reply
            assert isinstance(reply, Overloaded)
            self._is_routing = False
            if reply.permanent:
                raise ContextLengthExceeded(reply.why, param="messages")
            raise ServerOverloaded(reply.why, retry_after_s=reply.retry_after_s)

    def _refused(self, route: Route, reply: Refused) -> None:
        if reply.permanent:
            raise ContextLengthExceeded(reply.why, param="messages")
        self.refusals += 1
        refusal = Refusal(route.replica_id, reply.headroom_blocks, reply.backlog_tokens)
        self.request = msgspec.structs.replace(self.request, refusals=(refusal,))
        if reply.is_busy:
            self._num_busy += 1
        else:
            self._without(route.replica_id)

    def _lose_replica(self, route: Route | None = None) -> None:
        """Give up on a replica. Raises ReplicaLost when another must not be tried."""
        gone = route or self.route
        assert gone is not None
        self._num_lost += 1
        if self._link is not None:
            self._link.release(self._submit_id, abort=True)  # it may be alive after all
        self.route, self._link = None, None
        self._tell_lost(gone)
        self._without(gone.replica_id)
        if self._num_lost >= MAX_LOST_REPLICAS:
            raise ReplicaLost(REPLICA_DIED)

    def _without(self, replica_id: str) -> None:
        refused = dict.fromkeys((*self.request.refused_replicas, replica_id))
        self.request = msgspec.structs.replace(self.request, refused_replicas=tuple(refused))

    async def _follow(self) -> AsyncIterator[SequenceDelta]:
        """The replica's news. Ends without a finish reason when the replica is lost."""
        assert self._link is not None
        async for batch in self._link.deltas(self._submit_id, until_s=self.request.deadline_s):
            for delta in batch:
                if delta.times is not None:
                    self.times.first_token_s = time.time()
                    self.times.sequence = delta.times
                if delta.finish_reason in ("lost", "abort"):
                    return  # not by our wish: as if the stream had broken
                if delta.finish_reason == "error":
                    raise self._failure(delta)
                self.output_tokens += len(delta.token_ids)
                self.finish_reason = delta.finish_reason
                yield delta
                if self.finish_reason is not None:
                    return

        if time.time() >= self.request.deadline_s:
            raise DeadlineExceeded("the reply did not end within the request's deadline")

    def _failure(self, delta: SequenceDelta) -> ApiError:
        self.finish_reason = "error"
        return InternalError(f"the request failed in the engine: {delta.error}")

    def _settle(self) -> None:
        """The one place where a request ends, whatever the outcome."""
        self.times.ended_s = time.time()
        if self._is_routing:
            self.router.withdraw(self.request)
        if self.route is None or self._link is None:
            return
        link, self._link = self._link, None
        times = self.times
        self._tell(
            "finished",
            output_tokens=self.output_tokens,
            is_whole=self.finish_reason == "stop",
            ttft_ms=1000 * max(0.0, times.first_token_s - times.began_s),
        )
        link.release(self._submit_id, abort=self.finish_reason is None)

    @property
    def _submit_id(self) -> str:
        """Each attempt has an id of its own: an earlier one may linger on a replica thought dead."""
        request_id, again = self.request.request_id, self._num_submits
        return request_id if again <= 1 else f"{request_id}#{again}"

    def _tell_lost(self, route: Route) -> None:
        request_id = self.request.request_id
        self.router.tell(DispatchUpdate(request_id=request_id, replica_id=route.replica_id, outcome="lost"))

    def _tell(self, outcome: Literal["accepted", "finished"], **more: Any) -> None:
        assert self.route is not None
        request_id, replica_id = self.request.request_id, self.route.replica_id
        self.router.tell(
            DispatchUpdate(request_id=request_id, replica_id=replica_id, outcome=outcome, **more)
        )
