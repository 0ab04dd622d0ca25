"""Ingress's own HTTP server: clients that leave, a drain, and a port that several share."""

import asyncio
import socket
from contextlib import asynccontextmanager

import httpx
import pytest

from serving.http_server import HttpServer
from tests.serving.fleet_fakes import eventually

HOST = "127.0.0.1"


class App:
    """Reads the body, answers with two events, and waits before each for the test to let it go on."""

    def __init__(self, name: str = "it") -> None:
        self.name = name
        self.begin, self.go_on = asyncio.Event(), asyncio.Event()
        self.begun: list[bytes] = []
        self.ended: list[str] = []

    async def __call__(self, scope, receive, send):
        try:
            body, is_more = b"", True
            while is_more:
                message = await receive()
                body, is_more = body + message["body"], message["more_body"]
            self.begun.append(body)
            await self.begin.wait()
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": self.name.encode(), "more_body": True})
            await self.go_on.wait()
            await send({"type": "http.response.body", "body": b".", "more_body": False})
            await asyncio.sleep(0.05)  # what an answer leaves to do is done, whatever the client does now
            self.ended.append("whole")
        except asyncio.CancelledError:
            self.ended.append("cancelled")
            raise


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


@asynccontextmanager
async def serving(app: App, port: int | None = None):
    server, port = HttpServer(app), port or free_port()
    await server.start(HOST, port)
    async with httpx.AsyncClient(base_url=f"http://{HOST}:{port}", timeout=5) as client:
        yield server, client, port
    app.begin.set()
    app.go_on.set()
    await server.drain()


async def test_an_answer_is_whole_and_its_end_cancels_nothing():
    """Also of a large body; and a second request on the same connection is as good as the first."""
    app = App()
    app.begin.set()
    app.go_on.set()
    body = b"x" * 300_000
    async with serving(app) as (_, client, _):
        for _ in range(2):
            reply = await client.post("/", content=body)
            assert (reply.status_code, reply.content) == (200, b"it.")
        await eventually(lambda: app.ended == ["whole"] * 2)
        assert app.begun == [body] * 2


@pytest.mark.parametrize("is_streaming", [False, True])
async def test_a_client_that_leaves_cancels_its_request(is_streaming):
    """Before the first byte of the answer, and in its middle."""
    app = App()
    if is_streaming:
        app.begin.set()
    async with serving(app) as (_, _, port):
        reader, writer = await asyncio.open_connection(HOST, port)
        writer.write(b"POST / HTTP/1.1\r\nhost: it\r\ncontent-length: 2\r\n\r\nhi")
        await eventually(lambda: app.begun == [b"hi"])
        if is_streaming:
            await reader.readuntil(b"it\r\n")
        writer.close()
        await eventually(lambda: app.ended == ["cancelled"])


async def test_a_drain_waits_for_what_came_and_takes_nothing_more():
    """A stream under way runs to its end; a new connection is refused."""
    app = App()
    app.begin.set()
    server, port = HttpServer(app), free_port()
    await server.start(HOST, port)
    async with httpx.AsyncClient(base_url=f"http://{HOST}:{port}", timeout=5) as client:
        asked = asyncio.create_task(client.post("/", content=b"hi"))
        await eventually(lambda: app.begun)
        draining = asyncio.create_task(server.drain())
        await eventually(lambda: is_refused(port))
        assert not draining.done() and not asked.done()
        app.go_on.set()
        assert (await asked).content == b"it."
        await asyncio.wait_for(draining, 5)
        assert app.ended == ["whole"]


async def test_servers_share_a_port_and_one_is_enough():
    """New connections find both; when one has drained, all find the other."""
    apps = App("a"), App("b")
    for app in apps:
        app.begin.set()
        app.go_on.set()
    async with serving(apps[0]) as (_, _, port):
        async with serving(apps[1], port) as (_, _, _):
            assert {await ask_afresh(port) for _ in range(40)} == {"a.", "b."}
        assert {await ask_afresh(port) for _ in range(10)} == {"a."}


async def test_another_programs_port_is_not_shared():
    """It would answer some of the requests."""
    with socket.socket() as other:
        other.bind((HOST, 0))
        other.listen()
        with pytest.raises(OSError):
            await HttpServer(App()).start(HOST, other.getsockname()[1])


async def ask_afresh(port: int) -> str:
    async with httpx.AsyncClient(timeout=5) as client:
        return (await client.post(f"http://{HOST}:{port}/", content=b"hi")).text


def is_refused(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((HOST, port)) != 0
