"""Ingress and every ModelReplica in Serve's running set.

`ReplicaLink`  coalesced submits and aborts towards one replica, and its one stream of frames
`ReplicaLinks` one link a running replica: made when it joins, closed after its last request when it leaves
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress

from serving.background import Background
from serving.direct_calls import Replicas
from serving.errors import ReplicaGone
from serving.messages import (
    Accepted,
    SequenceDelta,
    StepFrame,
    Submit,
    SubmitReply,
    decode,
    encode,
)
from serving.transport import Coalescer, DelayLine, Stream

logger = logging.getLogger(__name__)

MEMBERSHIP_INTERVAL_S = 0.1
RECONNECT_S = 0.2


class ReplicaLink:
    """The pair of this Ingress and one replica."""

    def __init__(self, replicas: Replicas, replica_id: str, ingress_id: str, line: DelayLine) -> None:
        self.replica_id = replica_id
        self._replicas = replicas
        self._ingress_id = ingress_id
        self._line = line
        self._inboxes: dict[str, Stream[SequenceDelta]] = {}
        self._submits: Coalescer[Submit, SubmitReply] = Coalescer(self._submit)
        self._aborts: Coalescer[str, None] = Coalescer(self._abort)
        self._aborting: set[asyncio.Task[None]] = set()
        self._attached = asyncio.Event()  # or gone
        self._leaving = False
        self.gone = asyncio.Event()
        self._receiver = asyncio.create_task(self._receive())

    async def submit(self, submit: Submit) -> SubmitReply:
        """The replica's answer. Raises ReplicaGone. Cancelled, it ends what the replica accepts."""
        await self._attached.wait()
        if self.gone.is_set() or self._leaving:
            raise ReplicaGone(self.replica_id)
        self._inboxes[submit.request_id] = Stream()
        answer = asyncio.ensure_future(self._submits.send(submit))
        try:
            return await asyncio.shield(answer)
        except ReplicaGone:
            # Perhaps only the call failed, and the replica has accepted what nobody will read.
            self.release(submit.request_id, abort=True)
            raise
        except asyncio.CancelledError:
            # Sent now, an abort could overtake the submit it undoes.
            answer.add_done_callback(lambda answered: self._undo(submit.request_id, answered))
            raise

    async def deltas(self, request_id: str, *, until_s: float) -> AsyncIterator[list[SequenceDelta]]:
        """The news of an accepted request, until it is told to end.

        Ends without a finish reason when the replica is gone, or the unix time `until_s` comes.
        """
        inbox = self._inboxes[request_id]
        timer = asyncio.get_running_loop().call_later(until_s - time.time(), inbox.close)
        try:
            async for batch in inbox.batches():
                yield batch
        finally:
            timer.cancel()

    def release(self, request_id: str, *, abort: bool) -> None:
        """Forget a request; with `abort`, tell the replica to end it too.

        Nobody waits for the abort: whoever releases may itself be cancelled, and must not await.
        """
        self._inboxes.pop(request_id, None)
        if abort and not self.gone.is_set():
            task = asyncio.create_task(self._aborts.send(request_id))
            self._aborting.add(task)
            task.add_done_callback(self._aborting.discard)
        self._close_if_idle()

    @property
    def is_attached(self) -> bool:
        """The stream of frames is open both ways."""
        return self._attached.is_set() and not self.gone.is_set()

    def leave(self) -> None:
        """The replica has left the running set: no new work; the stream closes after the last request."""
        self._leaving = True
        self._close_if_idle()

    def close(self) -> None:
        self._receiver.cancel()

    def _undo(self, request_id: str, answered: asyncio.Future[SubmitReply]) -> None:
        failed = answered.cancelled() or answered.exception() is not None
        self.release(request_id, abort=not failed and isinstance(answered.result(), Accepted))

    def _close_if_idle(self) -> None:
        if self._leaving and not self._inboxes and not self._aborting:
            self._receiver.cancel()

    async def _submit(self, submits: list[Submit]) -> list[SubmitReply]:
        await self._line.cross()
        reply = await self._replicas.call(self.replica_id, "submit", self._ingress_id, encode(submits))
        await self._line.cross()
        return decode(reply, list[SubmitReply])

    async def _abort(self, request_ids: list[str]) -> list[None]:
        await self._line.cross()
        with suppress(ReplicaGone):  # gone, and its requests with it: which is what was asked
            await self._replicas.call(self.replica_id, "abort", request_ids)
        return [None] * len(request_ids)

    async def _receive(self) -> None:
        frames = self._line.carry(self._replicas.stream(self.replica_id, "frames", self._ingress_id))
        try:
            async for payload in frames:
                self._attached.set()
                for frame in decode(payload, list[StepFrame]):
                    for delta in frame.deltas:
                        if inbox := self._inboxes.get(delta.request_id):
                            inbox.put(delta)
        except ReplicaGone:
            logger.warning("replica is gone", extra={"replica": self.replica_id})
        finally:
            self.gone.set()
            self._attached.set()
            for inbox in self._inboxes.values():
                inbox.close()


class ReplicaLinks:
    """A link to every running replica of every deployment.

    Links are made when a replica joins, not when it is first needed: a death is then seen on the
    broken stream at once, also by an Ingress that has no request there.
    """

    def __init__(
        self,
        deployments: dict[str, tuple[Replicas, DelayLine]],
        ingress_id: str,
        on_lost: Callable[[str], None],
    ) -> None:
        self._deployments = deployments
        self._ingress_id = ingress_id
        self._on_lost = on_lost
        self._links: dict[str, ReplicaLink] = {}
        self.background = Background()
        self.background.start(self._keep(), "membership")

    def get(self, replica_id: str) -> ReplicaLink:
        """The link to a running replica; raises ReplicaGone where there is none."""
        link = self._links.get(replica_id)
        if link is None or link.gone.is_set():
            raise ReplicaGone(replica_id)
        return link

    @property
    def any_attached(self) -> bool:
        return any(link.is_attached for link in self._links.values())

    def close(self) -> None:
        self.background.close()
        for link in self._links.values():
            link.close()

    async def _keep(self) -> None:
        lost: set[str] = set()
        while True:
            running: set[str] = set()
            for replicas, line in self._deployments.values():
                for replica_id in replicas.running():
                    running.add(replica_id)
                    if replica_id not in self._links and replica_id not in lost:
                        self._links[replica_id] = ReplicaLink(replicas, replica_id, self._ingress_id, line)
            for replica_id, link in list(self._links.items()):
                if link.gone.is_set():
                    del self._links[replica_id]
                    if replica_id in running:  # dead before Serve knows it, or a broken connection
                        lost.add(replica_id)
                        self._on_lost(replica_id)
                        asyncio.get_running_loop().call_later(RECONNECT_S, lost.discard, replica_id)
                elif replica_id not in running:
                    link.leave()
            await asyncio.sleep(MEMBERSHIP_INTERVAL_S)
