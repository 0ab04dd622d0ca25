"""Replies, read back by the official client's own types and stream parser."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import openai
import pytest
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from serving.errors import InvalidRequest, ReplicaLost
from serving.openai_frames import (
    ChatStream,
    CompletionStream,
    Usage,
    chat_body,
    completion_body,
    error_body,
    model_body,
    models_body,
)

HEAD = ("chatcmpl-1", "org/model", 1_700_000_000)
USAGE = Usage(prompt_tokens=7, completion_tokens=3, cached_tokens=4)
PIECES = ['He said "hi"\n', "\u2028 👩‍👩‍👧 ", "\x00\\end"]


def events(stream: bytes) -> list[Any]:
    """The JSON of each event before [DONE], framing checked."""
    frames = stream.decode().split("\n\n")
    assert frames.pop() == ""
    assert all(frame.startswith("data: ") and "\n" not in frame for frame in frames)
    assert frames.pop() == "data: [DONE]"
    return [json.loads(frame.removeprefix("data: ")) for frame in frames]


def whole(stream: ChatStream | CompletionStream, *, usage: bool) -> bytes:
    body = [stream.first(), *map(stream.text, PIECES), stream.finish("stop")]
    return b"".join([*body, stream.usage(USAGE) if usage else b"", stream.done()])


@contextmanager
def client_for(body: bytes, kind: str, status: int = 200) -> Iterator[openai.OpenAI]:
    """The official client, against a server that answers everything with `body`."""

    class Server(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("content-length", 0)))
            self.send_response(status)
            self.send_header("content-type", kind)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        serving = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        serving.start()
        url = f"http://127.0.0.1:{server.server_port}/v1"
        try:
            with openai.OpenAI(api_key="k", base_url=url, max_retries=0) as client:
                yield client
        finally:
            server.shutdown()
            serving.join()


@pytest.mark.parametrize("include_usage", [False, True])
def test_chat_stream(include_usage: bool) -> None:
    """Role once and first, finish reason once in a chunk of its own, usage null until its own chunk."""
    chunks = events(whole(ChatStream(*HEAD, include_usage), usage=include_usage))
    parsed = [ChatCompletionChunk.model_validate(chunk, strict=True) for chunk in chunks]
    assert {chunk.id for chunk in parsed} == {"chatcmpl-1"}
    if include_usage:
        last, told = parsed.pop(), chunks.pop()
        assert last.choices == [] and last.usage and last.usage.total_tokens == 10
        assert told["usage"]["prompt_tokens_details"] == {"cached_tokens": 4}
        assert all(chunk["usage"] is None for chunk in chunks)
    else:
        assert all("usage" not in chunk for chunk in chunks)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert [delta.get("role") for delta in deltas] == ["assistant"] + [None] * (len(deltas) - 1)
    assert [delta.get("content") for delta in deltas] == ["", *PIECES, None]
    assert [chunk.choices[0].finish_reason for chunk in parsed] == [None] * (len(parsed) - 1) + ["stop"]


@pytest.mark.parametrize("include_usage", [False, True])
def test_completion_stream(include_usage: bool) -> None:
    """The same laws without a role; the client's type wants the last chunk's finish reason not null."""
    chunks = events(whole(CompletionStream(*HEAD, include_usage), usage=include_usage))
    if include_usage:
        assert Completion.model_validate(chunks.pop(), strict=True).usage
    Completion.model_validate(chunks[-1], strict=True)
    assert [chunk["choices"][0]["text"] for chunk in chunks] == [*PIECES, ""]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * len(PIECES) + ["stop"]
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}


def test_the_client_reads_a_stream() -> None:
    """The official client puts the pieces together again, control characters and all."""
    with client_for(whole(ChatStream(*HEAD, True), usage=True), "text/event-stream") as client:
        chunks = list(client.chat.completions.create(model="m", messages=[], stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "".join(
        PIECES
    )
    assert chunks[-1].usage and chunks[-1].usage.completion_tokens == 3


def test_the_client_raises_an_error_within_a_stream() -> None:
    """An error event in mid-stream becomes an exception that carries its message and code."""
    stream = ChatStream(*HEAD, False)
    body = stream.first() + stream.text("a") + stream.error(ReplicaLost("the replica is gone"))
    with (
        client_for(body, "text/event-stream") as client,
        pytest.raises(openai.APIError, match="the replica is gone") as caught,
    ):
        list(client.chat.completions.create(model="m", messages=[], stream=True))
    assert caught.value.code == "replica_lost"


def test_bodies() -> None:
    """Whole replies validate strictly against the official client's types and keep text and usage."""
    chat = ChatCompletion.model_validate_json(chat_body(*HEAD, "hé", "length", USAGE), strict=True)
    assert (chat.choices[0].message.content, chat.choices[0].finish_reason) == ("hé", "length")
    assert (
        chat.usage
        and chat.usage.prompt_tokens_details
        and chat.usage.prompt_tokens_details.cached_tokens == 4
    )
    assert json.loads(chat_body(*HEAD, "x", "stop", USAGE))["choices"][0]["message"]["refusal"] is None
    text = Completion.model_validate_json(completion_body(*HEAD, "hé", "stop", USAGE), strict=True)
    assert (text.choices[0].text, text.usage and text.usage.total_tokens) == ("hé", 10)


def test_models() -> None:
    """One model and the list of models are what the official client's types say."""
    assert Model.model_validate_json(model_body("org/m", 5), strict=True).id == "org/m"
    with client_for(models_body({"a": 1, "b": 2}), "application/json") as client:
        listed = client.models.list()
    assert [model.id for model in listed] == ["a", "b"]


def test_error_envelope() -> None:
    """The client finds message, param and type of an error body where OpenAI puts them."""
    body = error_body(InvalidRequest("no", param="seed"))
    with client_for(body, "application/json", 400) as client, pytest.raises(openai.BadRequestError) as caught:
        client.models.list()
    assert (caught.value.param, caught.value.type) == ("seed", "invalid_request_error")
