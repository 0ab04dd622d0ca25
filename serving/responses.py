"""The gateway's HTTP responses: JSON, OpenAI's error envelope, and server-sent events."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from serving import openai_frames
from serving.completions import Reply
from serving.errors import ApiError, InternalError, MethodNotAllowed, SearoomError
from serving.openai_frames import ChatStream, CompletionStream, Usage

JSON = "application/json"


class EventStream(Response):
    """Server-sent events, written as they come. `source` is closed at the end, also of a client
    that left before the first event: closing `events` alone would not, since it had not begun.
    """

    def __init__(self, events: AsyncIterator[tuple[bytes, bool]], source: AsyncGenerator[str]) -> None:
        """`events` says of each whether more come."""
        super().__init__(media_type="text/event-stream", headers={"cache-control": "no-cache"})
        del self.headers["content-length"]
        self._events = events
        self._source = source

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._source):
            await send(
                {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
            )
            async for event, is_more in self._events:
                await send({"type": "http.response.body", "body": event, "more_body": is_more})


async def events(
    reply: Reply,
    stream: ChatStream | CompletionStream,
    first: str,
    pieces: AsyncIterator[str],
    include_usage: bool,
) -> AsyncIterator[tuple[bytes, bool]]:
    """A reply as events, and whether more come. An error after the first piece is an event too: the
    status is long sent. What is known together leaves together: a write costs as much as making it.
    """
    unsent = stream.first() + (stream.text(first) if first else b"")
    try:
        if unsent and not reply.is_decided:
            yield unsent, True
            unsent = b""
        async for piece in pieces:
            if piece:
                unsent += stream.text(piece)
            if unsent and not reply.is_decided:
                yield unsent, True
                unsent = b""
    except SearoomError as failed:
        error = failed if isinstance(failed, ApiError) else InternalError(str(failed))
        yield unsent + stream.error(error), False
        return
    unsent += stream.finish(reply.finish_reason)  # type: ignore[arg-type]
    if include_usage:
        unsent += stream.usage(usage_of(reply))
    yield unsent + stream.done(), False


def usage_of(reply: Reply) -> Usage:
    return Usage(reply.prompt_tokens, reply.output_tokens, reply.cached_tokens)


def json_response(content: dict[str, Any]) -> Response:
    return Response(json.dumps(content), media_type=JSON)


def error_response(error: ApiError) -> Response:
    response = Response(openai_frames.error_body(error), status_code=error.status, media_type=JSON)
    if error.retry_after_s is not None:
        response.headers["retry-after"] = str(max(1, round(error.retry_after_s)))
    if isinstance(error, MethodNotAllowed):
        response.headers["allow"] = error.allow
    if error.status == 401:
        response.headers["www-authenticate"] = "Bearer"
    return response


async def answer_lifespan(receive: Receive, send: Send) -> None:
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return
