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
    """Pieces of the answer as they come. Raises SearoomError with the server's own message."""
    body = {"model": model, "messages": [{"role": "user", "content": prompt}], "stream": True, **controls}
    headers = {"Authorization": f"Bearer {key}"}
    url = f"{endpoint}/v1/chat/completions"
    with httpx.stream("POST", url, json=body, headers=headers, timeout=TIMEOUT) as response:
        if response.status_code != 200:
            response.read()
            raise SearoomError(response.json()["error"]["message"])
        for line in response.iter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            chunk = json.loads(line.removeprefix("data: "))
            if "error" in chunk:
                raise SearoomError(chunk["error"]["message"])
            for choice in chunk["choices"]:
                yield choice["delta"].get("content") or ""
