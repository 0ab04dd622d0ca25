"""The replies of OpenAI's API as bytes: whole bodies, and the server-sent events of a stream.

    first() text()* finish() [usage()] done()       or error() at any point

Parts that are the same on every chunk are rendered once a stream: a text chunk costs one escape of
its text and one join.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import orjson

from serving.errors import ApiError

Reason = Literal["stop", "length"]

_DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one request; `cached_tokens` are those of the prompt found in the prefix cache."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0

    def body(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
            "completion_tokens_details": {"reasoning_tokens": 0},
        }


class _Stream:
    """Events of one reply. `before_text` and `after_text` are the JSON of a choice around its text."""

    object: str
    before_text: bytes
    after_text: bytes

    def __init__(self, request_id: str, model: str, created: int, include_usage: bool) -> None:
        """`created` is unix seconds; `include_usage` announces the usage chunk on every other one."""
        head = {"id": request_id, "object": self.object, "created": created, "model": model}
        self._head = b"data: " + orjson.dumps(head)[:-1] + b',"choices":['
        self._tail = b'],"usage":null}\n\n' if include_usage else b"]}\n\n"
        self._before = self._head + self.before_text
        self._after = self.after_text + self._tail

    def text(self, text: str) -> bytes:
        """A chunk that adds `text`."""
        return b"".join((self._before, orjson.dumps(text), self._after))

    def usage(self, usage: Usage) -> bytes:
        """The chunk of no choices that tells the usage, where the client asked for it."""
        return b"".join((self._head, b'],"usage":', orjson.dumps(usage.body()), b"}\n\n"))

    def done(self) -> bytes:
        """The end of a stream that went well."""
        return _DONE

    def error(self, error: ApiError) -> bytes:
        """The last event of a stream that failed; clients raise it."""
        return b"".join((b"data: ", error_body(error), b"\n\n"))

    def _choice(self, choice: dict[str, Any]) -> bytes:
        return b"".join((self._head, orjson.dumps(choice), self._tail))


class ChatStream(_Stream):
    """The stream of a chat completion."""

    object = "chat.completion.chunk"
    before_text = b'{"index":0,"delta":{"content":'
    after_text = b'},"logprobs":null,"finish_reason":null}'

    def first(self) -> bytes:
        """The chunk that names the role, once, before any text."""
        delta = {"role": "assistant", "content": "", "refusal": None}
        return self._choice({"index": 0, "delta": delta, "logprobs": None, "finish_reason": None})

    def finish(self, reason: Reason) -> bytes:
        """The chunk that tells why the reply ended, once, after all text."""
        return self._choice({"index": 0, "delta": {}, "logprobs": None, "finish_reason": reason})


class CompletionStream(_Stream):
    """The stream of a text completion."""

    object = "text_completion"
    before_text = b'{"index":0,"text":'
    after_text = b',"logprobs":null,"finish_reason":null}'

    def first(self) -> bytes:
        """Nothing: a completion has no role to tell."""
        return b""

    def finish(self, reason: Reason) -> bytes:
        """The chunk that tells why the reply ended, once, after all text."""
        return self._choice({"index": 0, "text": "", "logprobs": None, "finish_reason": reason})


def chat_body(request_id: str, model: str, created: int, text: str, reason: Reason, usage: Usage) -> bytes:
    """The whole reply of a chat that is not streamed; `created` is unix seconds."""
    message = {"role": "assistant", "content": text, "refusal": None}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": reason}
    return _body(request_id, "chat.completion", model, created, choice, usage)


def completion_body(
    request_id: str, model: str, created: int, text: str, reason: Reason, usage: Usage
) -> bytes:
    """The whole reply of a completion that is not streamed; `created` is unix seconds."""
    choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": reason}
    return _body(request_id, "text_completion", model, created, choice, usage)


def model_body(name: str, created: int) -> bytes:
    """One model; `created` is unix seconds."""
    return orjson.dumps(_model(name, created))


def models_body(models: dict[str, int]) -> bytes:
    """The list of models: name → creation in unix seconds."""
    return orjson.dumps({"object": "list", "data": [_model(*item) for item in models.items()]})


def error_body(error: ApiError) -> bytes:
    """The envelope of every error."""
    return orjson.dumps(error.body())


def _model(name: str, created: int) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created, "owned_by": "searoom"}


def _body(
    request_id: str, kind: str, model: str, created: int, choice: dict[str, Any], usage: Usage
) -> bytes:
    head = {"id": request_id, "object": kind, "created": created, "model": model}
    return orjson.dumps(head | {"choices": [choice], "usage": usage.body()})
