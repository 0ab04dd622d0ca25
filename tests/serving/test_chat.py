"""`searoom chat` against a small server: pieces as they come, and errors in the server's own words."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest

from serving.chat import stream_answer
from serving.errors import SearoomError


class Server(ThreadingHTTPServer):
    """Answers every POST with `status` and `parts`, and remembers what it was asked."""

    status = 200
    parts: tuple[bytes, ...] = ()
    breaks_off = False  # closes the connection before the body is whole

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[tuple[str, dict[str, str], dict]] = []
        self.may_end = threading.Event()
        self.may_end.set()

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that leaves in mid-answer is what some tests are about."""

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.asked.append((self.path, dict(self.headers.items()), body))
        self.send_response(self.server.status)
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        for part in self.server.parts:
            self.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))
            self.wfile.flush()
        self.server.may_end.wait(5)
        if self.server.breaks_off:
            self.close_connection = True
        else:
            self.wfile.write(b"0\r\n\r\n")

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.may_end.set()
        server.shutdown()
        thread.join()


def event(**content: object) -> bytes:
    return b"data: " + json.dumps(content).encode() + b"\n\n"


def piece(text: str | None) -> bytes:
    return event(choices=[{"index": 0, "delta": {"content": text}}])


def ask(server: Server, **controls: object) -> Iterator[str]:
    return stream_answer(server.endpoint, "sk-key", "m", "Hello?", dict(controls))


def test_the_answer_comes_in_pieces(server):
    """The role's chunk and the usage's give no text; what was asked for is sent, with the key."""
    role = event(choices=[{"index": 0, "delta": {"role": "assistant"}}])
    usage = event(choices=[], usage={"total_tokens": 3})
    server.parts = (role, piece("Hé"), piece("llo"), piece(None), usage, b"data: [DONE]\n\n")
    assert "".join(ask(server, max_tokens=5, seed=1)) == "Héllo"
    ((path, headers, body),) = server.asked
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer sk-key"
    assert body == {
        "model": "m",
        "messages": [{"role": "user", "content": "Hello?"}],
        "stream": True,
        "max_tokens": 5,
        "seed": 1,
    }


def test_a_piece_is_shown_before_the_next_is_there(server):
    """The answer streams: the first piece is here while the server still holds the end back."""
    server.may_end.clear()
    server.parts = (piece("first"),)
    pieces = ask(server)
    assert next(pieces) == "first"
    server.may_end.set()
    assert list(pieces) == []


def test_an_error_is_the_servers_own_words(server):
    """Before the stream as a body, within it as an event: the message, and what came before it."""
    envelope = {"error": {"message": "no such model", "type": "t", "param": None, "code": None}}
    server.status, server.parts = 404, (json.dumps(envelope).encode(),)
    with pytest.raises(SearoomError, match=r"^no such model$"):
        list(ask(server))
    server.status, server.parts = 200, (piece("Hal"), event(**envelope))
    pieces = ask(server)
    assert next(pieces) == "Hal"
    with pytest.raises(SearoomError, match=r"^no such model$"):
        next(pieces)


@pytest.mark.parametrize("body", [b"Internal Server Error", b"[]", b'{"error": "x"}', b""])
def test_an_answer_that_is_not_ours_is_told_by_its_status(server, body):
    """A proxy in between speaks its own language; its status is said, without a traceback."""
    server.status, server.parts = 502, (body,) if body else ()
    with pytest.raises(SearoomError, match="502"):
        list(ask(server))


def test_a_stream_that_breaks_off_is_an_error(server):
    """Half an answer is not taken for a whole one."""
    server.parts, server.breaks_off = (piece("Hal"),), True
    pieces = ask(server)
    assert next(pieces) == "Hal"
    with pytest.raises(SearoomError, match="broke off"):
        next(pieces)


def test_nobody_at_home_is_a_connect_error(server):
    """The command line has its own words for an endpoint that does not answer."""
    with pytest.raises(httpx.ConnectError):
        list(stream_answer("http://127.0.0.1:1", "k", "m", "x", {}))
