"""The HTTP side of Ingress: routes, authentication, the error envelope, server-sent events.

A pure ASGI application. Every route names who may call it, and every error leaves in OpenAI's
envelope: unknown routes, wrong methods and unparsable bodies too.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from serving import openai_api, openai_frames
from serving.auth import Caller, KeyRing
from serving.completions import Completions, Reply
from serving.detokenizer import StreamDecoder
from serving.errors import (
    ApiError,
    BodyTooLarge,
    InternalError,
    MethodNotAllowed,
    ModelNotFound,
    NotFound,
    ServerOverloaded,
)
from serving.model_spec import ModelSpec
from serving.openai_api import ChatRequest, CompletionRequest
from serving.openai_frames import ChatStream, CompletionStream
from serving.request_log import RequestLog
from serving.responses import (
    JSON,
    EventStream,
    answer_lifespan,
    error_response,
    events,
    json_response,
    usage_of,
)
from serving.tokenizer import Tokenizer
from serving.tracing import RequestTrace

logger = logging.getLogger(__name__)

MODEL_PATH = "/v1/models/"


@dataclass(frozen=True)
class GatewayLimits:
    max_body_bytes: int
    context_tokens: int


@dataclass(frozen=True)
class Call:
    """One HTTP request on its way through a route."""

    request: Request
    request_id: str
    caller: Caller | None
    trace: RequestTrace


Handler = Callable[[Call], Awaitable[Response]]


@dataclass(frozen=True)
class Route:
    """What answers a path, by which method, and whether a key is needed."""

    method: str
    handler: Handler
    needs_key: bool


class Gateway:
    """The ASGI application. `is_ready` and `fleet_status` look at what lies behind it."""

    def __init__(
        self,
        model: str,
        tokenizer: Tokenizer,
        spec: ModelSpec,
        keys: KeyRing,
        completions: Completions,
        limits: GatewayLimits,
        log: RequestLog,
        *,
        is_ready: Callable[[], bool],
        fleet_status: Callable[[], Awaitable[bytes]],
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._spec = spec
        self._keys = keys
        self._completions = completions
        self._limits = limits
        self._log = log
        self._is_ready = is_ready
        self._fleet_status = fleet_status
        self._created = int(time.time())
        self._routes = {
            "/v1/chat/completions": Route("POST", self._chat, True),
            "/v1/completions": Route("POST", self._complete, True),
            "/v1/models": Route("GET", self._models, True),
            MODEL_PATH: Route("GET", self._one_model, True),
            "/status": Route("GET", self._status, True),
            "/health": Route("GET", self._health, False),
            "/ready": Route("GET", self._ready, False),
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await answer_lifespan(receive, send)
            return
        if scope["type"] == "websocket":
            await send({"type": "websocket.close"})
            return
        request = Request(scope, receive)
        request_id = secrets.token_hex(12)
        try:
            response = await self._answer(request, request_id)
        except ClientDisconnect:
            return
        except ApiError as error:  # before there was a reply: one that had begun counts itself
            self._log.refused(error)
            response = error_response(error)
        except Exception:
            logger.exception("request failed", extra={"request_id": request_id})
            response = error_response(InternalError("the gateway failed; the log tells more"))
        response.headers["x-request-id"] = request_id
        await response(scope, receive, send)

    async def _answer(self, request: Request, request_id: str) -> Response:
        path = request.scope["path"]
        route = self._routes.get(MODEL_PATH if path.startswith(MODEL_PATH) else path)
        if route is None:
            raise NotFound(f"there is no route {path}")
        if request.method != route.method:
            raise MethodNotAllowed(f"{path} takes {route.method}, not {request.method}", allow=route.method)
        caller = self._keys.authenticate(request.headers.get("authorization")) if route.needs_key else None
        trace = self._log.begin(request.headers.get("traceparent"))
        return await route.handler(Call(request, request_id, caller, trace))

    async def _health(self, call: Call) -> Response:
        return json_response({"status": "ok"})

    async def _ready(self, call: Call) -> Response:
        if not self._is_ready():
            # Answered, not raised: a probe is no request, and is not counted as one.
            return error_response(ServerOverloaded("no replica can serve yet", retry_after_s=1.0))
        return json_response({"status": "ready"})

    async def _status(self, call: Call) -> Response:
        return Response(await self._fleet_status(), media_type=JSON)

    async def _models(self, call: Call) -> Response:
        return Response(openai_frames.models_body({self._model: self._created}), media_type=JSON)

    async def _one_model(self, call: Call) -> Response:
        self._require_model(call.request.scope["path"].removeprefix(MODEL_PATH))
        return Response(openai_frames.model_body(self._model, self._created), media_type=JSON)

    async def _chat(self, call: Call) -> Response:
        wanted = openai_api.parse_chat(await self._body(call.request))
        self._require_model(wanted.model)
        token_ids = self._tokenizer.encode(
            self._tokenizer.render_chat(wanted.template_messages()), add_special=False
        )
        decoder = self._tokenizer.stream_decoder(wanted.stop_strings)
        request_id = f"chatcmpl-{call.request_id}"
        stream = ChatStream(request_id, self._model, int(time.time()), wanted.include_usage)
        reply = self._start(call, request_id, wanted, token_ids, decoder)
        return await self._respond(call, wanted, reply, stream, openai_frames.chat_body)

    async def _complete(self, call: Call) -> Response:
        wanted = openai_api.parse_completion(await self._body(call.request))
        self._require_model(wanted.model)
        token_ids = self._tokenizer.encode_prompt(wanted.one_prompt)
        decoder = self._tokenizer.stream_decoder(wanted.stop_strings, continues_text=True)
        request_id = f"cmpl-{call.request_id}"
        stream = CompletionStream(request_id, self._model, int(time.time()), wanted.include_usage)
        reply = self._start(call, request_id, wanted, token_ids, decoder)
        return await self._respond(call, wanted, reply, stream, openai_frames.completion_body)

    def _start(
        self,
        call: Call,
        request_id: str,
        wanted: ChatRequest | CompletionRequest,
        token_ids: list[int],
        decoder: StreamDecoder,
    ) -> Reply:
        assert call.caller is not None
        sampling = openai_api.to_sampling(
            wanted,
            len(token_ids),
            self._limits.context_tokens,
            self._spec.eos_token_ids,
            lambda: secrets.randbits(64),
        )
        return self._completions.start(
            request_id, call.caller, token_ids, sampling, decoder, call.trace.traceparent
        )

    async def _respond(
        self,
        call: Call,
        wanted: ChatRequest | CompletionRequest,
        reply: Reply,
        stream: ChatStream | CompletionStream,
        body: Callable[..., bytes],
    ) -> Response:
        pieces = self._logged(reply, call.trace)
        try:
            if wanted.stream:
                # The first piece is awaited here, so that an error before it still has its own status.
                first = await anext(pieces, "")
                answer = EventStream(events(reply, stream, first, pieces, wanted.include_usage), pieces)
                answer.headers.update(_where(reply))
                return answer
            async with aclosing(pieces):
                text = "".join([piece async for piece in pieces])
        except ApiError as error:  # counted with its reply
            return error_response(error)
        created = int(reply.started_s)
        payload = body(reply.request_id, self._model, created, text, reply.finish_reason, usage_of(reply))
        return Response(payload, media_type=JSON, headers=_where(reply))

    async def _logged(self, reply: Reply, trace: RequestTrace) -> AsyncGenerator[str]:
        """The reply's pieces; when it ends, however it does, it is counted and traced once."""
        error: ApiError | None = None
        try:
            async with aclosing(reply.text()) as pieces:
                async for piece in pieces:
                    yield piece
        except ApiError as failed:
            error = failed
            raise
        finally:
            self._log.ended(reply, trace, error)

    async def _body(self, request: Request) -> bytes:
        limit = self._limits.max_body_bytes
        chunks: list[bytes] = []
        size = 0
        async for chunk in request.stream():
            size += len(chunk)
            if size > limit:
                raise BodyTooLarge(f"the body is larger than {limit} bytes; send less text")
            chunks.append(chunk)
        return b"".join(chunks)

    def _require_model(self, name: str) -> None:
        if name != self._model:
            raise ModelNotFound(
                f"the model {name[:100]!r} does not exist; GET /v1/models lists what does", param="model"
            )


def _where(reply: Reply) -> dict[str, str]:
    """Headers that say where a reply ran, and why there."""
    route = reply.generation.route
    if route is None:
        return {}
    times = reply.generation.times
    return {
        "x-searoom-region": route.region,
        "x-searoom-replica": route.replica_id,
        "x-searoom-why": route.why,
        "x-searoom-queue-ms": f"{max(0.0, 1000 * (times.picked_s - reply.started_s)):.0f}",
    }
