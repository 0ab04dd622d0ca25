"""Inference workers that answer when they are told to: what a real gateway is put in front of.

    gateway ──HTTP──► worker: "request 17 arrived here" ... release(17) ... its answer

Each is a socket that understands as much HTTP as the gateways need. A request names itself by the
last characters of its prompt, which every gateway passes on unchanged.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from types import TracebackType

import orjson

ID_CHARS = 8
MODEL = "mock"
MAX_MODEL_LEN = 1 << 20
ARRIVAL_TIMEOUT_S = 20.0

_INFORMATION: dict[str, object] = {
    "/health": {},
    "/v1/models": {
        "object": "list",
        "data": [{"id": MODEL, "object": "model", "created": 0, "owned_by": MODEL}],
    },
    "/get_model_info": {"model_path": MODEL, "is_generation": True},
    "/model_info": {"model_path": MODEL, "is_generation": True},
    "/get_server_info": {"model_id": MODEL, "model_path": MODEL, "served_model_name": MODEL},
    "/server_info": {"model_id": MODEL, "model_path": MODEL, "served_model_name": MODEL},
    "/version": {"version": "0.0.0"},
}


def named(text: str, number: int) -> str:
    """The prompt of request `number`: `text`, and its name at the end."""
    return f"{text}#{number:0{ID_CHARS - 1}d}"


class MockWorkers:
    """`count` workers on ports of their own, inside `async with`."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._servers: list[asyncio.Server] = []
        self._arrivals: asyncio.Queue[tuple[int, int]] = asyncio.Queue()
        self._held: dict[int, asyncio.Event] = {}
        self._connections: set[asyncio.Task[None]] = set()
        self.urls: list[str] = []

    async def __aenter__(self) -> MockWorkers:
        for worker in range(self._count):
            server = await asyncio.start_server(self._handler(worker), "127.0.0.1", 0)
            self._servers.append(server)
            self.urls.append(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for server in self._servers:
            server.close()
        for task in list(self._connections):
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def arrival(self) -> tuple[int, int]:
        """The next request to arrive at any worker: (worker, request). Raises TimeoutError."""
        return await asyncio.wait_for(self._arrivals.get(), ARRIVAL_TIMEOUT_S)

    def release(self, number: int) -> None:
        """Answer this request."""
        self._held.pop(number).set()

    def _handler(
        self, worker: int
    ) -> Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task is not None
            self._connections.add(task)
            try:
                with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
                    while await self._exchange(worker, reader, writer):
                        pass
            finally:
                self._connections.discard(task)
                writer.close()

        return serve

    async def _exchange(
        self, worker: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bool:
        """One request of a connection that is kept; False at its end."""
        head = await reader.readuntil(b"\r\n\r\n")
        if b" HTTP/1." not in head:
            return False  # a gateway that tries whether gRPC is spoken here
        request_line, *header_lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (h.partition(":") for h in header_lines)}
        path = request_line.split(" ")[1].partition("?")[0]
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        if path == "/v1/completions":
            answer, status = await self._complete(worker, orjson.loads(body)), "200 OK"
        elif path == "/tokenize":
            tokens = [ord(char) for char in orjson.loads(body)["prompt"]]
            answer = {"count": len(tokens), "max_model_len": MAX_MODEL_LEN, "tokens": tokens}
            status = "200 OK"
        else:
            answer = _INFORMATION.get(path, {"error": "no such path"})
            status = "200 OK" if path in _INFORMATION else "404 Not Found"
        content = orjson.dumps(answer)
        head_lines = (
            f"HTTP/1.1 {status}",
            "content-type: application/json",
            f"content-length: {len(content)}",
        )
        writer.write("\r\n".join((*head_lines, "", "")).encode() + content)
        await writer.drain()
        return headers.get("connection", "").lower() != "close"

    async def _complete(self, worker: int, body: dict[str, object]) -> object:
        number = int(str(body["prompt"])[-ID_CHARS + 1 :])
        released = self._held.setdefault(number, asyncio.Event())
        self._arrivals.put_nowait((worker, number))
        await released.wait()
        return {
            "id": f"mock-{number}",
            "object": "text_completion",
            "created": 0,
            "model": MODEL,
            "choices": [{"index": 0, "text": "ok", "logprobs": None, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
        }
