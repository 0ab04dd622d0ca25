"""A tiny OpenAI-like endpoint over real TCP, whose every answer is scripted."""

import asyncio
import json
import time
from collections.abc import Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field


@dataclass
class Script:
    """One answer. `end`: "done", "cut" (the connection is closed), "error" (an event), "bare" (no [DONE])."""

    pieces: list[str] = field(default_factory=lambda: [" a", " b", " c"])
    first_s: float = 0.0  # before the first piece
    gap_s: float = 0.0  # before each further one
    end: str = "done"
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: dict | str = ""  # of a status other than 200
    usage: dict | None = None
    content_type: str = "text/event-stream"


REFUSAL = Script(
    status=503,
    headers={"Retry-After": "0"},
    body={
        "error": {"message": "no room", "type": "service_unavailable_error", "code": "server_is_overloaded"}
    },
)


class FakeEndpoint:
    def __init__(self, answer: Callable[[int, dict], Script]) -> None:
        """`answer` gets a request's number and body."""
        self._answer = answer
        self.bodies: list[dict] = []
        self.came_s: list[float] = []
        self.headers: list[dict[str, str]] = []
        self.url = ""

    async def serve(self, reader, writer) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
                headers = {k.lower(): v for k, _, v in (line.partition(": ") for line in head[1:] if line)}
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                if head[0].startswith("GET /v1/models "):
                    whole(writer, 200, {}, {"data": [{"id": "tiny"}]})
                    continue
                self.came_s.append(time.perf_counter())
                self.headers.append(headers)
                self.bodies.append(json.loads(body))
                script = self._answer(len(self.bodies) - 1, self.bodies[-1])
                if script.status != 200 or script.content_type != "text/event-stream":
                    whole(writer, script.status, script.headers, script.body, script.content_type)
                elif not await stream(writer, script):
                    return
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


def whole(writer, status, headers, body, content_type="application/json"):
    payload = body.encode() if isinstance(body, str) else json.dumps(body).encode()
    lines = [f"HTTP/1.1 {status} Words", f"content-length: {len(payload)}", f"content-type: {content_type}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + payload)


async def stream(writer, script) -> bool:
    """False when the connection is not to be used any more."""
    lines = [
        "HTTP/1.1 200 OK",
        "content-type: text/event-stream; charset=utf-8",
        "transfer-encoding: chunked",
    ]
    lines += [f"{name}: {value}" for name, value in script.headers.items()]
    writer.write("\r\n".join(lines).encode() + b"\r\n\r\n")
    send(
        writer,
        {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]},
    )
    for number, piece in enumerate(script.pieces):
        await writer.drain()
        await asyncio.sleep(script.gap_s if number else script.first_s)
        send(writer, {"choices": [{"index": 0, "delta": {"content": piece}, "finish_reason": None}]})
    if script.end == "cut":
        await writer.drain()
        writer.transport.abort()
        return False
    if script.end == "error":
        send(writer, {"error": {"message": "the replica died", "code": "replica_lost"}})
    elif script.end == "done":
        send(writer, {"choices": [{"index": 0, "delta": {}, "finish_reason": "length"}]})
        if script.usage is not None:
            send(writer, {"choices": [], "usage": script.usage})
        chunk(writer, b"data: [DONE]\n\n")
    writer.write(b"0\r\n\r\n")
    return True


def send(writer, event):
    chunk(writer, b"data: " + json.dumps(event).encode() + b"\n\n")


def chunk(writer, data):
    writer.write(b"%x\r\n%b\r\n" % (len(data), data))


@asynccontextmanager
async def fake_endpoint(answer: Callable[[int, dict], Script] | Script):
    endpoint = FakeEndpoint(answer if callable(answer) else lambda number, body: answer)
    server = await asyncio.start_server(endpoint.serve, "127.0.0.1", 0)
    endpoint.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield endpoint
    finally:
        server.close()
