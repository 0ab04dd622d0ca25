"""Calls between our deployments on TCP connections of their own, past Serve's handles.

    caller ──"door"──► callee    through its Serve handle, once: where it listens, and a secret
    caller ◄═ calls ═► callee    one connection a pair; many calls at once, answered in any order

A unary call of a Serve handle costs both sides milliseconds of CPU, one of these tens of microseconds.
Serve still says who runs, places every process, carries the streams, and passes the secret on: whoever
may not call the deployment cannot learn it. A message is its length, 4 bytes little-endian, and msgpack.
None of this knows Ray.

`Door`             listens for a deployment, and answers with its methods
`DirectService`    a deployment any of whose replicas may answer, called this way
`DirectReplicas`   a deployment's replicas, each called by its id
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import os
import secrets
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable
from contextvars import Context
from dataclasses import dataclass
from enum import IntEnum
from functools import partial
from typing import Any, Protocol, cast

import msgspec

from serving.errors import ReplicaGone
from serving.messages import decode, encode

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 5.0
SECRET_BYTES = 32
MAX_MESSAGE_BYTES = 1 << 30
# A peer whose machine is gone sends nothing, not even an end: it is noticed within some 10 s.
KEEPALIVE = ((socket.TCP_KEEPIDLE, 4), (socket.TCP_KEEPINTVL, 2), (socket.TCP_KEEPCNT, 3))
USER_TIMEOUT_MS = 10_000
_LENGTH = struct.Struct("<I")


@dataclass(frozen=True)
class Tls:
    """What encrypts the connections, each side known to the other by its certificate."""

    server: ssl.SSLContext
    client: ssl.SSLContext


def ray_tls() -> Tls | None:
    """What Ray itself encrypts with, where RAY_USE_TLS says that it does."""
    if os.environ.get("RAY_USE_TLS", "0").lower() not in ("1", "true"):
        return None
    authority = os.environ["RAY_TLS_CA_CERT"]
    tls = Tls(
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=authority),
        ssl.create_default_context(ssl.Purpose.SERVER_AUTH, cafile=authority),
    )
    tls.server.verify_mode = ssl.CERT_REQUIRED
    for context in (tls.server, tls.client):
        context.load_cert_chain(os.environ["RAY_TLS_SERVER_CERT"], os.environ["RAY_TLS_SERVER_KEY"])
    return tls


class Address(msgspec.Struct, frozen=True):
    """Where a Door is, and what opens it."""

    host: str
    port: int
    secret: bytes


class Outcome(IntEnum):
    DONE = 0
    GONE = 1  # the callee said ReplicaGone
    FAILED = 2


Call = tuple[int, str, list[Any]]  # its number, the method, the arguments
Answer = tuple[int, Outcome, Any]
_read_call = msgspec.msgpack.Decoder(Call).decode
_read_answer = msgspec.msgpack.Decoder(Answer).decode


class _Peer(asyncio.Protocol):
    """One end of a connection."""

    max_bytes = MAX_MESSAGE_BYTES

    def __init__(self) -> None:
        self._received = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        connected: socket.socket = transport.get_extra_info("socket")
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for option, value in (*KEEPALIVE, (socket.TCP_USER_TIMEOUT, USER_TIMEOUT_MS)):
            connected.setsockopt(socket.IPPROTO_TCP, option, value)

    def data_received(self, data: bytes) -> None:
        received = self._received
        received += data
        begin = 0
        while len(received) >= begin + _LENGTH.size:
            (size,) = _LENGTH.unpack_from(received, begin)
            if size > self.max_bytes:
                self._transport.abort()
                return
            end = begin + _LENGTH.size + size
            if len(received) < end:
                break
            self.message(bytes(received[begin + _LENGTH.size : end]))
            begin = end
        del received[:begin]

    def send(self, message: bytes) -> None:
        self._transport.write(_LENGTH.pack(len(message)) + message)

    def message(self, message: bytes) -> None:
        raise NotImplementedError


class Door:
    """Answers those who know its secret, with the methods of its owner that were named, and no others."""

    def __init__(self, server: asyncio.Server, address: Address) -> None:
        self._server = server
        self.address = encode(address)

    @classmethod
    async def open(cls, owner: object, methods: Iterable[str], host: str, tls: Tls | None) -> Door:
        """Listen on a free port of `host` from now on."""
        secret = secrets.token_bytes(SECRET_BYTES)
        named = {name: getattr(owner, name) for name in methods}
        server = await asyncio.get_running_loop().create_server(
            lambda: _Callee(named, secret), host, 0, ssl=tls.server if tls else None
        )
        return cls(server, Address(host, server.sockets[0].getsockname()[1], secret))

    def close(self) -> None:
        """Listen no longer. Calls that came in are still answered."""
        self._server.close()


class _Callee(_Peer):
    """A Door's end of one connection. Calls that still run when the caller goes away are cancelled."""

    max_bytes = SECRET_BYTES  # until the secret was said

    def __init__(self, methods: dict[str, Callable[..., Coroutine[Any, Any, Any]]], secret: bytes) -> None:
        super().__init__()
        self._methods = methods
        self._secret = secret
        self._is_known = False
        self._running: set[asyncio.Task[Any]] = set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        asyncio.get_running_loop().call_later(CONNECT_TIMEOUT_S, self._turn_away_if_silent)

    def _turn_away_if_silent(self) -> None:
        if not self._is_known:
            self._transport.abort()

    def message(self, message: bytes) -> None:
        if not self._is_known:
            self._is_known = hmac.compare_digest(message, self._secret)
            if not self._is_known:
                logger.warning("a caller without the secret was turned away")
                self._transport.abort()
            self.max_bytes = MAX_MESSAGE_BYTES
            return
        number, method, arguments = _read_call(message)
        task = asyncio.create_task(self._methods[method](*arguments))
        self._running.add(task)
        task.add_done_callback(partial(self._answer, number, method))

    def connection_lost(self, error: Exception | None) -> None:
        for task in self._running:
            task.cancel()

    def _answer(self, number: int, method: str, task: asyncio.Task[Any]) -> None:
        self._running.discard(task)
        if task.cancelled() or self._transport.is_closing():
            return
        error = task.exception()
        if error is None:
            answer: Answer = (number, Outcome.DONE, task.result())
        elif isinstance(error, ReplicaGone):
            answer = (number, Outcome.GONE, None)
        else:
            logger.error("a call of %s failed", method, exc_info=error)
            answer = (number, Outcome.FAILED, type(error).__name__)
        self.send(msgspec.msgpack.encode(answer))


class _Caller(_Peer):
    """The other end."""

    def __init__(self, callee: str) -> None:
        super().__init__()
        self._callee = callee
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._num_calls = 0
        self.is_open = True

    async def call(self, method: str, arguments: tuple[Any, ...]) -> Any:
        """The answer. Raises ReplicaGone when the callee says so, or the connection ends before."""
        if not self.is_open:
            raise ReplicaGone(self._callee)
        self._num_calls += 1
        number = self._num_calls
        answer = self._waiting[number] = asyncio.get_running_loop().create_future()
        self.send(msgspec.msgpack.encode((number, method, arguments)))
        try:
            return await answer
        finally:
            self._waiting.pop(number, None)

    def message(self, message: bytes) -> None:
        number, outcome, result = _read_answer(message)
        waiting = self._waiting.get(number)
        if waiting is None or waiting.done():  # the caller has given up
            return
        if outcome is Outcome.DONE:
            waiting.set_result(result)
        elif outcome is Outcome.GONE:
            waiting.set_exception(ReplicaGone(self._callee))
        else:
            waiting.set_exception(RuntimeError(f"{self._callee} failed with {result}; its log tells more"))

    def connection_lost(self, error: Exception | None) -> None:
        self.is_open = False
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_exception(ReplicaGone(self._callee))


class _Line:
    """The connection to one callee: made when it is needed, and again after it broke."""

    def __init__(self, callee: str, ask: Callable[[], Awaitable[bytes]], tls: Tls | None) -> None:
        """`ask` gives the callee's encoded Address, or raises ReplicaGone."""
        self._callee = callee
        self._ask = ask
        self._tls = tls
        self._connecting: asyncio.Task[_Caller] | None = None

    async def call(self, method: str, *arguments: Any) -> Any:
        if not self.is_usable:
            # In no request's context: Serve ends what was asked in that of a request whose client leaves.
            self._connecting = asyncio.create_task(self._connect(), context=Context())
        assert self._connecting is not None
        caller = await asyncio.shield(self._connecting)
        return await caller.call(method, arguments)

    @property
    def is_usable(self) -> bool:
        """It stands, or is being made."""
        task = self._connecting
        if task is None or not task.done():
            return task is not None
        return not task.cancelled() and task.exception() is None and task.result().is_open

    async def _connect(self) -> _Caller:
        address = decode(await self._ask(), Address)
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                _, caller = await asyncio.get_running_loop().create_connection(
                    lambda: _Caller(self._callee),
                    address.host,
                    address.port,
                    ssl=self._tls.client if self._tls else None,
                )
        except (OSError, TimeoutError) as error:
            raise ReplicaGone(self._callee) from error
        caller.send(address.secret)
        return caller


class Service(Protocol):
    """A deployment as one; `ray_compat.ServiceHandle` is the real one."""

    async def call(self, method: str, *args: object) -> bytes: ...
    def stream(self, method: str, *args: object) -> AsyncIterator[bytes]: ...


class Replicas(Protocol):
    """One deployment's replicas; `ray_compat.PinnedHandle` is the real one."""

    def running(self) -> frozenset[str]: ...
    async def call(self, replica_id: str, method: str, *args: object) -> bytes: ...
    def stream(self, replica_id: str, method: str, *args: object) -> AsyncIterator[bytes]: ...


class DirectService:
    """A Service whose calls go past it. All go to the replica that answered first, until it ends."""

    def __init__(self, service: Service, name: str, tls: Tls | None) -> None:
        self._service = service
        self._line = _Line(name, lambda: service.call("door"), tls)

    async def call(self, method: str, *args: object) -> Any:
        """Raises ReplicaGone when the one that took the call dies."""
        return await self._line.call(method, *args)

    def stream(self, method: str, *args: object) -> AsyncIterator[bytes]:
        return self._service.stream(method, *args)


class DirectReplicas:
    """Replicas whose calls go past them.

    One that has left the running set still finishes its streams, and on its connection still takes aborts.
    """

    def __init__(self, replicas: Replicas, tls: Tls | None) -> None:
        self._replicas = replicas
        self._tls = tls
        self._lines: dict[str, _Line] = {}

    def running(self) -> frozenset[str]:
        return self._replicas.running()

    async def call(self, replica_id: str, method: str, *args: object) -> Any:
        """Raises ReplicaGone when it is not there or dies meanwhile."""
        if (line := self._lines.get(replica_id)) is None:
            self._lines = {name: line for name, line in self._lines.items() if line.is_usable}
            ask = partial(self._replicas.call, replica_id, "door")
            line = self._lines[replica_id] = _Line(replica_id, ask, self._tls)
        return await line.call(method, *args)

    def stream(self, replica_id: str, method: str, *args: object) -> AsyncIterator[bytes]:
        return self._replicas.stream(replica_id, method, *args)
