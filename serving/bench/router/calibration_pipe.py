"""Calls between a process and its child, as msgpack bytes over one pipe, for two asyncio loops."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from multiprocessing.connection import Connection

import msgspec

from serving.errors import ReplicaGone
from serving.messages import decode, encode

REPLY = ""

Answer = Callable[[str, bytes], Awaitable[bytes]]
"""What is done for a method and its payload."""


class Call(msgspec.Struct, frozen=True, array_like=True):
    """`method` REPLY answers the call of that number; number 0 wants no answer."""

    number: int
    method: str
    payload: bytes


class Pipe:
    """One end. Calls are begun in the order in which they were made; `closed` when either end is gone."""

    def __init__(self, connection: Connection, name: str, answer: Answer) -> None:
        self.closed = asyncio.Event()
        self.failure: BaseException | None = None  # of an answer, which closes the pipe
        self._connection = connection
        self._name = name
        self._answer = answer
        self._last_number = 0
        self._asked: dict[int, asyncio.Future[bytes]] = {}
        self._answering: set[asyncio.Task[None]] = set()
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(connection.fileno(), self._readable)

    async def call(self, method: str, payload: bytes = b"") -> bytes:
        """Raises ReplicaGone when the other end is gone, or goes before it has answered."""
        self._last_number += 1
        asked = self._asked[self._last_number] = self._loop.create_future()
        self._send(Call(self._last_number, method, payload))
        return await asked

    def tell(self, method: str, payload: bytes) -> None:
        """Nobody waits for it. Raises ReplicaGone."""
        self._send(Call(0, method, payload))

    def close(self) -> None:
        """Calls that wait for an answer raise ReplicaGone."""
        if self.closed.is_set():
            return
        self.closed.set()
        self._loop.remove_reader(self._connection.fileno())
        self._connection.close()
        for asked in self._asked.values():
            if not asked.done():
                asked.set_exception(ReplicaGone(self._name))
        self._asked.clear()

    def _send(self, call: Call) -> None:
        if self.closed.is_set():
            raise ReplicaGone(self._name)
        try:
            self._connection.send_bytes(encode(call))
        except OSError as gone:
            self.close()
            raise ReplicaGone(self._name) from gone

    def _readable(self) -> None:
        try:
            while not self.closed.is_set() and self._connection.poll():
                self._received(decode(self._connection.recv_bytes(), Call))
        except (EOFError, OSError):
            self.close()

    def _received(self, call: Call) -> None:
        if call.method == REPLY:
            asked = self._asked.pop(call.number)
            if not asked.done():
                asked.set_result(call.payload)
            return
        task = asyncio.create_task(self._serve(call))
        self._answering.add(task)
        task.add_done_callback(self._served)

    async def _serve(self, call: Call) -> None:
        payload = await self._answer(call.method, call.payload)
        if call.number and not self.closed.is_set():
            self._send(Call(call.number, REPLY, payload))

    def _served(self, task: asyncio.Task[None]) -> None:
        self._answering.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self.failure = task.exception()
            self.close()
