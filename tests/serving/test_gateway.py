"""The HTTP side, through ASGI: real tokenizer, real links, and replicas in memory behind them."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator

import httpx
import pytest

from serving.dispatcher import DispatcherLimits
from serving.errors import ServerOverloaded
from serving.messages import SequenceDelta
from serving.model_files import ModelFiles
from serving.tokenizer import Tokenizer
from tests.serving.fleet_fakes import eventually
from tests.serving.gateway_door import (
    ASKED,
    CHAT,
    KEY,
    MAX_BODY_BYTES,
    OTHER_KEY,
    TEXT,
    Door,
    Exchange,
    open_door,
)


@pytest.fixture(scope="module")
def tokenizer(embedded_model: ModelFiles) -> Tokenizer:
    return Tokenizer(embedded_model)


@pytest.fixture
async def door(embedded_model: ModelFiles, tokenizer: Tokenizer) -> AsyncIterator[Door]:
    async with open_door(embedded_model, tokenizer) as door:
        yield door


def assert_envelope(reply: httpx.Response, status: int, code: str | None) -> None:
    assert reply.status_code == status
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["code"] == code
    assert reply.headers["x-request-id"]


async def test_a_chat_is_answered_whole(door):
    """The replica gets the rendered prompt; text, reason and usage come back; it is counted once."""
    door.answer_all()
    reply = await door.http.post(CHAT, json=ASKED)
    body = reply.json()
    assert reply.status_code == 200 and body["choices"][0]["message"]["content"] == TEXT
    assert body["choices"][0]["finish_reason"] == "stop"
    (submit,) = door.replica.submits
    assert body["id"] == submit.request_id == f"chatcmpl-{reply.headers['x-request-id']}"
    usage = body["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (len(submit.token_ids), len(door.answer))
    assert door.requests("stop") == 1


async def test_what_is_known_together_is_written_together(door):
    """A write a step: the role goes with the first text, and the reason, usage and [DONE] with the last."""
    door.replica.script = lambda submit: [
        SequenceDelta(request_id=submit.request_id, token_ids=(token,), finish_reason=reason)
        for token, reason in zip(door.answer, [None] * (len(door.answer) - 1) + ["length"], strict=True)
    ]
    wanted = ASKED | {"stream": True, "stream_options": {"include_usage": True}}
    exchange = Exchange(door.app, CHAT, wanted)
    await exchange.task
    assert exchange.text == TEXT
    bodies = [message["body"] for message in exchange.sent if message["type"] == "http.response.body"]
    assert len(bodies) == len(door.answer)
    assert b'"role"' in bodies[0] and bodies[-1].count(b"data: ") == 4


async def test_a_stream_joins_to_the_same_text(door):
    """Role first, then text, the reason, the usage that was asked for, and [DONE]."""
    door.answer_all()
    wanted = ASKED | {"stream": True, "stream_options": {"include_usage": True}}
    exchange = Exchange(door.app, CHAT, wanted)
    await exchange.task
    chunks = exchange.chunks
    assert exchange.status == 200 and exchange.text == TEXT
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop"
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] == len(door.answer)
    assert exchange.sent[-1]["body"].endswith(b"data: [DONE]\n\n") and not exchange.sent[-1]["more_body"]
    assert dict(exchange.sent[0]["headers"])[b"content-type"].startswith(b"text/event-stream")
    assert door.requests("stop") == 1


async def test_a_stop_string_ends_the_request_on_the_replica(door):
    """The engine knows no strings: the gateway cuts the text, and has the replica end it."""
    reply = asyncio.create_task(door.http.post(CHAT, json=ASKED | {"stop": " Paris"}))
    await eventually(lambda: door.replica.running)
    (request_id,) = door.replica.running
    for token in door.answer:
        door.replica.say(request_id, token)
    choice = (await reply).json()["choices"][0]
    assert choice["message"]["content"] == "The capital is" and choice["finish_reason"] == "stop"
    await eventually(lambda: door.replica.aborts == [request_id])
    assert door.requests("stop") == 1


async def test_tenants_have_different_hash_roots(door):
    """One tenant's cached prefix is not another's: the root of the chain depends on the key."""
    door.answer_all()
    for key in (KEY, KEY, OTHER_KEY):
        await door.http.post(CHAT, json=ASKED, headers={"Authorization": f"Bearer {key}"})
    first, again, other = (submit.hash_root for submit in door.replica.submits)
    assert first == again != other


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code"),
    [
        ("GET", "/v1/nothing", b"", 404, "not_found"),
        ("GET", "/v1/models/other", b"", 404, "model_not_found"),
        ("GET", CHAT, b"", 405, "method_not_allowed"),
        ("POST", "/v1/models", b"{}", 405, "method_not_allowed"),
        ("POST", CHAT, b"{", 400, None),
        ("POST", CHAT, b"", 400, None),
        ("POST", CHAT, b"\xff\xfe", 400, None),
        ("POST", CHAT, b"x" * (MAX_BODY_BYTES + 1), 413, "request_too_large"),
        ("POST", CHAT, json.dumps(ASKED | {"model": "other"}).encode(), 404, "model_not_found"),
        ("POST", CHAT, json.dumps(ASKED | {"logprobs": True}).encode(), 400, "unsupported_parameter"),
        ("POST", CHAT, json.dumps(ASKED | {"max_tokens": 10**6}).encode(), 400, "context_length_exceeded"),
    ],
)  # fmt: skip
async def test_whatever_is_wrong_the_body_is_the_envelope(door, method, path, body, status, code):
    """All four fields, a request id, and no replica is troubled; the metrics count it once."""
    assert_envelope(await door.http.request(method, path, content=body), status, code)
    assert door.requests(code or "invalid_request_error", "none") == 1
    assert door.replica.submits == [] and door.fleet.router.picks == []


@pytest.mark.parametrize("header", [None, "Bearer sk-wrong", "Basic x"])
async def test_a_key_is_asked_for_before_anything_else(door, header):
    """Even a broken body is not read for a stranger; health and readiness need no key."""
    headers = {} if header is None else {"Authorization": header}
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(door.app), base_url="http://door", headers=headers
    ) as stranger:
        for method, path in (
            ("POST", CHAT),
            ("POST", "/v1/completions"),
            ("GET", "/v1/models"),
            ("GET", "/status"),
        ):
            reply = await stranger.request(method, path, content=b"{")
            assert_envelope(reply, 401, "invalid_api_key")
            assert reply.headers["www-authenticate"] == "Bearer"
        assert (await stranger.get("/health")).status_code == 200
        assert (await stranger.get("/ready")).status_code == 200


async def test_the_model_is_listed_and_readiness_follows_the_fleet(door):
    """/v1/models and /v1/models/m agree; /ready is 503 with Retry-After while nobody can serve."""
    listed = (await door.http.get("/v1/models")).json()["data"]
    assert listed == [(await door.http.get("/v1/models/m")).json()] and listed[0]["id"] == "m"
    door.is_ready = False
    reply = await door.http.get("/ready")
    assert_envelope(reply, 503, "server_is_overloaded")
    assert int(reply.headers["retry-after"]) >= 1


async def test_nothing_of_an_unexpected_exception_leaves_the_house(door, caplog):
    """500 in the envelope without a word of the exception's text; the log has its type and the id."""
    door.status_error = RuntimeError("password=hunter2")
    with caplog.at_level(logging.ERROR):
        reply = await door.http.get("/status")
    assert_envelope(reply, 500, "internal_error")
    assert "hunter2" not in reply.text and "RuntimeError" not in reply.text
    (record,) = caplog.records
    assert record.request_id == reply.headers["x-request-id"]  # type: ignore[attr-defined]
    door.status_error = ServerOverloaded("the Router does not answer", retry_after_s=7)
    assert (await door.http.get("/status")).headers["retry-after"] == "7"


@pytest.mark.parametrize("stream", [False, True])
async def test_errors_before_the_first_token_have_their_own_status(embedded_model, tokenizer, stream):
    """Streamed or not: 504 at the deadline, 400 for what cannot fit; each is counted by its code."""
    wanted = ASKED | {"stream": stream}
    async with open_door(embedded_model, tokenizer, timeout_s=0.1) as door:
        door.replica.gate.clear()
        assert_envelope(await door.http.post(CHAT, json=wanted), 504, "deadline_exceeded")
        door.replica.gate.set()
        await eventually(lambda: door.replica.aborts)
        door.replica.refuse(permanent=True)
        assert_envelope(await door.http.post(CHAT, json=wanted), 400, "context_length_exceeded")
        for code in ("deadline_exceeded", "context_length_exceeded"):
            assert door.requests(code, "none") == 1


async def test_a_full_house_is_503_with_retry_after(embedded_model, tokenizer):
    """No room and no place to wait: the Router's prediction becomes the header."""
    limits = DispatcherLimits(max_waiting_requests=0)
    async with open_door(embedded_model, tokenizer, limits=limits) as door:
        holder = Exchange(door.app, CHAT, ASKED | {"max_tokens": 256})
        await eventually(lambda: door.replica.running)
        reply = await door.http.post(CHAT, json=ASKED | {"max_tokens": 256})
        assert_envelope(reply, 503, "server_is_overloaded")
        assert int(reply.headers["retry-after"]) >= 1
        holder.task.cancel()


async def test_a_death_in_mid_answer_is_an_event_on_a_stream_and_502_otherwise(door):
    """The stream's status is long sent: its last event is the error, and there is no [DONE]."""
    exchange = Exchange(door.app, CHAT, ASKED | {"stream": True})
    whole = asyncio.create_task(door.http.post(CHAT, json=ASKED))
    await eventually(lambda: len(door.replica.running) == 2)
    for request_id in door.replica.running:
        door.replica.say(request_id, door.answer[0])
    await eventually(lambda: exchange.text)
    door.replica.die()
    await exchange.task
    assert exchange.status == 200 and exchange.chunks[-1]["error"]["code"] == "replica_lost"
    assert b"[DONE]" not in exchange.sent[-2]["body"]
    assert_envelope(await whole, 502, "replica_lost")
    assert door.requests("replica_lost") == 2


@pytest.mark.parametrize("way", ["the server cancels", "the next write fails"])
async def test_a_client_that_leaves_in_mid_stream_is_not_computed_for(door, way):
    """The replica is told to end it, once; the Router's books are closed; it is counted as aborted."""
    exchange = Exchange(door.app, CHAT, ASKED | {"stream": True})
    await eventually(lambda: door.replica.running)
    (request_id,) = door.replica.running
    door.replica.say(request_id, door.answer[0])
    await eventually(lambda: exchange.text)
    if way == "the server cancels":
        exchange.task.cancel()
    else:
        exchange.is_client_gone = True
        door.replica.say(request_id, door.answer[1])
    await asyncio.gather(exchange.task, return_exceptions=True)
    await eventually(lambda: door.replica.aborts == [request_id] and door.fleet.num_held == 0)
    assert door.requests("abort") == 1


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_before_the_first_token_is_not_computed_for(door, stream):
    """The request ends on the replica and in the Router's books; nothing was sent, and it is counted."""
    exchange = Exchange(door.app, CHAT, ASKED | {"stream": stream})
    await eventually(lambda: door.replica.running)
    exchange.task.cancel()
    await asyncio.gather(exchange.task, return_exceptions=True)
    await eventually(lambda: not door.replica.running and door.fleet.num_held == 0)
    assert exchange.sent == [] and door.requests("abort") == 1


async def test_a_client_that_leaves_as_the_headers_are_written_is_not_computed_for(door):
    """The first piece is there and no event has been read: the source is closed all the same."""
    exchange = Exchange(door.app, CHAT, ASKED | {"stream": True})
    await eventually(lambda: door.replica.running)
    (request_id,) = door.replica.running
    exchange.is_client_gone = True
    door.replica.say(request_id, door.answer[0])
    await asyncio.gather(exchange.task, return_exceptions=True)
    await eventually(lambda: door.replica.aborts == [request_id] and door.requests("abort") == 1)


async def test_completions_take_text_or_token_ids(door):
    """Ids go to the replica as they are; one out of the vocabulary is refused with its field."""
    door.answer_all()
    reply = await door.http.post("/v1/completions", json={"model": "m", "prompt": [5, 6, 7]})
    assert reply.json()["choices"][0]["text"] == TEXT
    assert door.replica.submits[0].token_ids == (5, 6, 7)
    refused = await door.http.post("/v1/completions", json={"model": "m", "prompt": [10**6]})
    assert_envelope(refused, 400, None)
    assert refused.json()["error"]["param"] == "prompt"
