"""Ingress and the Router: coalesced picks and updates, and the stream that answers queued requests."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any, Protocol, TypeVar

import msgspec

from serving.background import Background
from serving.errors import ReplicaGone
from serving.messages import DispatchUpdate, Queued, RouteReply, RouteRequest, decode, encode
from serving.transport import Coalescer

logger = logging.getLogger(__name__)

Item = TypeVar("Item")

RECONNECT_S = 0.2


class Service(Protocol):
    """A deployment as one; `ray_compat.ServiceHandle` is the real one."""

    async def call(self, method: str, *args: object) -> bytes: ...
    def stream(self, method: str, *args: object) -> AsyncIterator[bytes]: ...


class RouterLink:
    """The pair of this Ingress and the Router."""

    def __init__(self, router: Service, ingress_id: str) -> None:
        self._router = router
        self._ingress_id = ingress_id
        self._picks: Coalescer[RouteRequest, RouteReply] = Coalescer(self._pick)
        self._updates: Coalescer[DispatchUpdate, None] = Coalescer(self._update)
        self._queued: dict[str, asyncio.Future[RouteReply | None]] = {}  # None: the Router died
        self._attached = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self.background = Background()
        self.background.start(self._receive(), "routes")

    async def pick(self, request: RouteRequest) -> RouteReply:
        """A Route or Overloaded, after waiting in the Router's queue if need be.

        Raises ReplicaGone when the Router died: what it had queued must be asked for again.
        """
        await self._attached.wait()
        answer: asyncio.Future[RouteReply | None] = asyncio.get_running_loop().create_future()
        self._queued[request.request_id] = answer  # before the call: the stream may be the faster one
        try:
            reply = await self._picks.send(request)
            final = await answer if isinstance(reply, Queued) else reply
            if final is None:
                raise ReplicaGone("Router")
            return final
        finally:
            self._queued.pop(request.request_id, None)

    def tell(self, update: DispatchUpdate) -> None:
        """What became of a Route; nobody waits for it."""
        self._soon(self._updates, update)

    def withdraw(self, request: RouteRequest) -> None:
        """Nobody waits for this request's Route any more; nobody waits for this either.

        It is asked for once more, with its deadline over: the Router forgets it, queued or routed.
        Going the way of `pick`, it cannot overtake it.
        """
        self._soon(self._picks, msgspec.structs.replace(request, deadline_s=0.0))

    @property
    def is_attached(self) -> bool:
        return self._attached.is_set()

    def close(self) -> None:
        self.background.close()
        for task in self._tasks:
            task.cancel()

    def _soon(self, messages: Coalescer[Item, Any], item: Item) -> None:
        async def send() -> None:
            # A new Router starts from the replicas' reports, and knows nothing of earlier requests.
            with suppress(ReplicaGone):
                await messages.send(item)

        task = asyncio.create_task(send())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _pick(self, requests: list[RouteRequest]) -> list[RouteReply]:
        return decode(await self._router.call("pick", encode(requests)), list[RouteReply])

    async def _update(self, updates: list[DispatchUpdate]) -> list[None]:
        await self._router.call("update", encode(updates))
        return [None] * len(updates)

    async def _receive(self) -> None:
        while True:
            try:
                async for payload in self._router.stream("routes", self._ingress_id):
                    self._attached.set()
                    for reply in decode(payload, list[RouteReply]):
                        answer = self._queued.get(reply.request_id)
                        if answer is not None and not answer.done():
                            answer.set_result(reply)
            except ReplicaGone:
                logger.warning("the Router's stream ended; connecting again")
            self._attached.clear()
            for answer in self._queued.values():
                if not answer.done():
                    answer.set_result(None)
            await asyncio.sleep(RECONNECT_S)
