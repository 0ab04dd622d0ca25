"""Ingress and the Router: coalesced picks and updates, and the stream that answers queued requests."""

from __future__ import annotations

import asyncio
import logging

import msgspec

from serving.background import Background
from serving.direct_calls import Service
from serving.errors import ReplicaGone
from serving.messages import DispatchUpdate, Queued, RouteReply, RouteRequest, decode, encode
from serving.transport import Coalescer

logger = logging.getLogger(__name__)

RECONNECT_S = 0.2
TELL_S = 0.02  # how long what became of Routes may wait for more of its kind: reports are rarer still


class RouterLink:
    """The pair of this Ingress and the Router."""

    def __init__(self, router: Service, ingress_id: str) -> None:
        self._router = router
        self._ingress_id = ingress_id
        self._picks: Coalescer[RouteRequest, RouteReply] = Coalescer(self._pick)
        self._updates: Coalescer[DispatchUpdate, None] = Coalescer(self._update)
        self._untold: list[DispatchUpdate] = []
        self._telling: asyncio.TimerHandle | None = None
        self._queued: dict[str, asyncio.Future[RouteReply | None]] = {}  # None: the Router died
        self._attached = asyncio.Event()
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
        """What became of a Route; nobody waits for it, but a loss is told at once.

        A new Router starts from the replicas' reports, and misses nothing of earlier requests.
        """
        self._untold.append(update)
        if update.outcome == "lost":
            self._tell()
        elif self._telling is None:
            self._telling = asyncio.get_running_loop().call_later(TELL_S, self._tell)

    def withdraw(self, request: RouteRequest) -> None:
        """Nobody waits for this request's Route any more; nobody waits for this either.

        It is asked for once more, with its deadline over: the Router forgets it, queued or routed.
        Going the way of `pick`, it cannot overtake it.
        """
        self._picks.post(msgspec.structs.replace(request, deadline_s=0.0))

    @property
    def is_attached(self) -> bool:
        return self._attached.is_set()

    def close(self) -> None:
        self.background.close()
        if self._telling is not None:
            self._telling.cancel()

    def _tell(self) -> None:
        if self._telling is not None:
            self._telling.cancel()
            self._telling = None
        for update in self._untold:
            self._updates.post(update)
        self._untold = []

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
