"""The requests of OpenAI's API: what is accepted, what is refused by name, and what it asks of the engine.

Fields honoured are those of the models below. `user`, `metadata`, `safety_identifier` and
`prompt_cache_key` are accepted as labels: they never alter a reply. Of all other fields see
serving/openai_fields.py. Replies are in serving/openai_frames.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, TypeVar, cast

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from serving import openai_fields
from serving.errors import ContextLengthExceeded, InvalidRequest, UnsupportedField
from serving.messages import SamplingParams
from serving.openai_fields import without_unsupported

DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's default for /v1/completions
MAX_MESSAGES = 4096
MAX_STOP_CHARS = 256

_LABELS = {"user", "metadata", "safety_identifier", "prompt_cache_key"}
_SHAPES = {  # said instead of pydantic's words, which for a union name its branches
    "content": "must be a string or a list of text parts",
    "prompt": "must be a string, a list of token ids, or a list with exactly one of those",
    "stop": f"must be a string or up to 4 strings, each of 1 to {MAX_STOP_CHARS} characters",
}

TokenId = Annotated[int, Field(ge=0, lt=2**31)]
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]


class _Wire(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class TextPart(_Wire):
    type: Literal["text"]
    text: str


class Message(_Wire):
    """One message. `name` is passed on to the model's template, which may show it."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    def for_template(self) -> dict[str, Any]:
        """As templates know it: parts joined by newlines, `developer` under its older name `system`."""
        content = self.content
        text = content if isinstance(content, str) else "\n".join(part.text for part in content)
        message = {"role": "system" if self.role == "developer" else self.role, "content": text}
        return message if self.name is None else message | {"name": self.name}


class StreamOptions(_Wire):
    include_usage: bool | None = None


class _Request(_Wire):
    """What both kinds of generation share. A field that is null has its default."""

    model: str = Field(min_length=1, max_length=256)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, lt=2**31)
    min_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: StopString | Annotated[list[StopString], Field(max_length=4)] | None = None
    ignore_eos: bool | None = None

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


class ChatRequest(_Request):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: int | None = Field(None, ge=1)

    @property
    def wanted_tokens(self) -> int | None:
        """The most tokens the client wants; None when it did not say."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def template_messages(self) -> list[dict[str, Any]]:
        return [message.for_template() for message in self.messages]


class CompletionRequest(_Request):
    """POST /v1/completions, with one prompt."""

    prompt: str | list[TokenId] | list[str] | list[list[TokenId]]

    @property
    def wanted_tokens(self) -> int | None:
        """The most tokens the client wants; None when it did not say."""
        return self.max_tokens

    @property
    def one_prompt(self) -> str | list[int]:
        """The prompt itself, out of the list it may have come in."""
        if isinstance(self.prompt, str):
            return self.prompt
        ids = [item for item in self.prompt if isinstance(item, int)]
        return ids if len(ids) == len(self.prompt) else cast(str | list[int], self.prompt[0])


AnyRequest = TypeVar("AnyRequest", ChatRequest, CompletionRequest)


def parse_chat(body: bytes) -> ChatRequest:
    """The request in `body`; InvalidRequest, with `param` the dotted path, says what is wrong with it."""
    fields = _read_object(body)
    fields = without_unsupported(fields, {*ChatRequest.model_fields, *_LABELS}, openai_fields.CHAT_FIELDS)
    messages = fields.get("messages")
    if isinstance(messages, list):
        fields["messages"] = [
            _supported_message(message, f"messages.{at}.") for at, message in enumerate(messages)
        ]
    request = _validate(ChatRequest, fields)
    if request.max_tokens is not None and request.max_completion_tokens not in (None, request.max_tokens):
        raise InvalidRequest(
            "max_tokens and max_completion_tokens differ: give one of them", param="max_completion_tokens"
        )
    return request


def parse_completion(body: bytes) -> CompletionRequest:
    """The request in `body`; InvalidRequest, with `param` the dotted path, says what is wrong with it."""
    fields = _read_object(body)
    honoured = {*CompletionRequest.model_fields, *_LABELS}
    fields = without_unsupported(fields, honoured, openai_fields.COMPLETION_FIELDS)
    prompt = fields.get("prompt")
    if isinstance(prompt, list) and len(prompt) != 1 and not all(isinstance(item, int) for item in prompt):
        raise UnsupportedField(
            "prompt: one prompt a request is supported; send the others apart", param="prompt"
        )
    return _validate(CompletionRequest, fields)


def to_sampling(
    request: ChatRequest | CompletionRequest,
    prompt_tokens: int,
    context_tokens: int,
    eos_ids: Sequence[int],
    draw_seed: Callable[[], int],
) -> SamplingParams:
    """What the engine is asked for.

    A chat may by default use the rest of the context, a completion 16 tokens. `draw_seed` gives a
    uint64 where the client named no seed. Raises ContextLengthExceeded when prompt and wanted
    tokens do not fit in `context_tokens`, and InvalidRequest for an empty prompt.
    """
    param = "messages" if isinstance(request, ChatRequest) else "prompt"
    if prompt_tokens == 0:
        raise InvalidRequest("the prompt is empty: it needs at least one token", param=param)
    return SamplingParams(
        max_tokens=_max_tokens(request, prompt_tokens, context_tokens, param),
        temperature=1.0 if request.temperature is None else request.temperature,
        top_k=max(request.top_k or 0, 0),
        top_p=1.0 if request.top_p is None else request.top_p,
        min_p=request.min_p or 0.0,
        seed=draw_seed() if request.seed is None else request.seed % 2**64,
        stop_token_ids=() if request.ignore_eos else tuple(eos_ids),
    )


def _max_tokens(
    request: ChatRequest | CompletionRequest, prompt_tokens: int, context_tokens: int, param: str
) -> int:
    room = context_tokens - prompt_tokens
    wanted = request.wanted_tokens
    limit = f"This model's maximum context length is {context_tokens} tokens."
    if room < 1:
        raise ContextLengthExceeded(
            f"{limit} However, your {param} resulted in {prompt_tokens} tokens, and a reply needs at least "
            f"one more. Please reduce the length of the {param}.",
            param=param,
        )
    if wanted is None:
        return room if isinstance(request, ChatRequest) else min(room, DEFAULT_COMPLETION_TOKENS)
    if wanted > room:
        raise ContextLengthExceeded(
            f"{limit} However, you requested {prompt_tokens + wanted} tokens ({prompt_tokens} in the "
            f"{param}, {wanted} in the completion). Please reduce the length of the {param} or completion.",
            param=param,
        )
    return wanted


def _read_object(body: bytes) -> dict[str, Any]:
    try:
        content = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"the body is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise InvalidRequest("the body must be a JSON object")
    return content


def _supported_message(message: Any, path: str) -> Any:
    """`message` without fields that ask for nothing; what is no message at all is left to validation."""
    if not isinstance(message, dict):
        return message
    if message.get("role") in ("tool", "function"):
        raise UnsupportedField(
            f"{path}role: {message['role']} messages are not supported yet", param=f"{path}role"
        )
    message = without_unsupported(message, Message.model_fields, openai_fields.MESSAGE_FIELDS, path)
    parts = message.get("content")
    for at, part in enumerate(parts if isinstance(parts, list) else ()):
        kind = part.get("type") if isinstance(part, dict) else "text"
        if isinstance(kind, str) and kind != "text":
            raise UnsupportedField(
                f"{path}content.{at}: parts of type {kind[:40]} are not supported; text parts are",
                param=f"{path}content.{at}.type",
            )
    return message


def _validate(kind: type[AnyRequest], fields: dict[str, Any]) -> AnyRequest:
    fields = _check_labels(fields)
    options = fields.get("stream_options")
    if isinstance(options, dict):
        fields["stream_options"] = without_unsupported(
            options, StreamOptions.model_fields, openai_fields.STREAM_OPTION_FIELDS, "stream_options."
        )
    try:
        request = kind.model_validate(fields)
    except ValidationError as error:
        raise _invalid(error) from error
    if request.stream_options is not None and not request.stream:
        raise InvalidRequest("stream_options is only for stream: true", param="stream_options")
    return request


def _check_labels(fields: dict[str, Any]) -> dict[str, Any]:
    """`fields` without the labels, which are only checked for their type."""
    for name in _LABELS & fields.keys():
        value = fields[name]
        if value is not None and not isinstance(value, dict if name == "metadata" else str):
            kind = "an object" if name == "metadata" else "a string"
            raise InvalidRequest(f"{name} must be {kind}", param=name)
    return {name: value for name, value in fields.items() if name not in _LABELS}


def _invalid(error: ValidationError) -> InvalidRequest:
    """The first of pydantic's findings, with the path as the client wrote it and none of its input."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    path: list[str] = []
    words = first["msg"]
    for step in first["loc"]:
        path.append(str(step))
        if step in _SHAPES:  # what follows names branches of a union, not keys of the request
            words = _SHAPES[str(step)]
            break
    param = ".".join(path)
    if first["type"] == "missing":
        return InvalidRequest(f"{param} is required", param=param)
    return InvalidRequest(f"{param}: {words}", param=param)
