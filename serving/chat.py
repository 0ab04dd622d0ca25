"""`searoom chat`: one streamed answer from the endpoint, as text."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx

from serving.errors import SearoomError

TIMEOUT = httpx.Timeout(600.0, connect=5.0)


def stream_answer(
    endpoint: str, key: str, model: str, prompt: str, controls: dict[str, Any]
) -> Iterator[str]:
    """Pieces of the answer as they come.

    Raises SearoomError with the server's own message, or when the stream breaks off;
    httpx.ConnectError where no server answers.
    """
    body = {"model": model, "messages": [{"role": "user", "content": prompt}], "stream": True, **controls}
    headers = {"Authorization": f"Bearer {key}"}
    url = f"{endpoint}/v1/chat/completions"
    try:
        with httpx.stream("POST", url, json=body, headers=headers, timeout=TIMEOUT) as response:
            if response.status_code != 200:
                response.read()
                raise SearoomError(_message(response))
            yield from _pieces(response.iter_lines())
    except (httpx.ReadError, httpx.RemoteProtocolError, httpx.ReadTimeout) as broken:
        raise SearoomError("the answer broke off: the server or the connection is gone") from broken


def _pieces(lines: Iterator[str]) -> Iterator[str]:
    for line in lines:
        if not line.startswith("data: ") or line == "data: [DONE]":
            continue
        chunk = json.loads(line.removeprefix("data: "))
        if "error" in chunk:
            raise SearoomError(chunk["error"]["message"])
        for choice in chunk["choices"]:
            yield choice["delta"].get("content") or ""


def _message(response: httpx.Response) -> str:
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, TypeError, KeyError):  # not from Searoom: a proxy in between, or Serve itself
        return f"the server answered {response.status_code} {response.reason_phrase}"
