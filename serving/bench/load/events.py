"""The server-sent events of a streamed chat completion, read at little cost a token."""

from __future__ import annotations

from typing import Any, NamedTuple

import orjson

DONE = b"[DONE]"
_TEXT_KEYS = ("content", "reasoning_content", "reasoning")  # the last two: servers of reasoning models


class BadEvent(ValueError):
    """Not an event of a chat completion. Says what came instead."""


class Usage(NamedTuple):
    prompt_tokens: int
    output_tokens: int
    cached_tokens: int


class Piece(NamedTuple):
    """What one event tells."""

    text: str = ""
    is_finished: bool = False
    usage: Usage | None = None
    error: tuple[str, str] | None = None  # code and message


class EventLines:
    """Cuts a byte stream into the payloads of its `data:` lines."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, received: bytes) -> list[bytes]:
        """The payloads that are complete now; what is not yet is kept."""
        lines = (self._rest + received).split(b"\n")
        self._rest = lines.pop()
        return [line[5:].strip() for line in lines if line.startswith(b"data:")]


def read_piece(payload: bytes) -> Piece:
    """The piece in an event's payload, which is not DONE. Raises BadEvent."""
    try:
        event = orjson.loads(payload)
        if event.get("error"):
            return Piece(error=error_of(event))
        text, is_finished = "", False
        for choice in event.get("choices") or ():
            delta = choice.get("delta") or {}
            text += next((delta[key] for key in _TEXT_KEYS if delta.get(key)), "")
            is_finished |= choice.get("finish_reason") is not None
        usage = event.get("usage")
        return Piece(text, is_finished, usage and _usage(usage))
    except (orjson.JSONDecodeError, AttributeError, TypeError, KeyError) as error:
        raise BadEvent(f"not an event of a chat completion: {payload[:80]!r}") from error


def error_of(body: Any) -> tuple[str, str]:
    """Code and message of an error's body; the type where there is no code."""
    error = body.get("error") if isinstance(body, dict) else None
    if not isinstance(error, dict):
        return "", str(error or body)[:200]
    return str(error.get("code") or error.get("type") or ""), str(error.get("message", ""))[:200]


def _usage(usage: dict[str, Any]) -> Usage:
    details = usage.get("prompt_tokens_details") or {}
    return Usage(usage["prompt_tokens"], usage["completion_tokens"], details.get("cached_tokens") or 0)
