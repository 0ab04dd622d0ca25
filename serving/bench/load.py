"""A closed-loop load on an OpenAI-compatible endpoint: every stream starts at once, and runs to its limit.

Times are the client's, so the whole way counts: HTTP, routing, queueing, the engine.
"""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass

import httpx
import numpy as np
from rich.console import Console
from rich.table import Table

TIMEOUT = httpx.Timeout(600.0, connect=10.0)


@dataclass(frozen=True)
class LoadPlan:
    endpoint: str
    api_key: str
    model: str | None
    max_tokens: int


@dataclass(frozen=True)
class StreamTimes:
    """One stream, in seconds from its start."""

    first_token_s: float
    end_s: float
    output_tokens: int


@dataclass(frozen=True)
class LoadResult:
    num_streams: int
    elapsed_s: float
    streams: tuple[StreamTimes, ...]

    @property
    def tokens_per_s(self) -> float:
        return sum(stream.output_tokens for stream in self.streams) / self.elapsed_s

    def ttft_ms(self, percentile: float) -> float:
        return float(np.percentile([stream.first_token_s for stream in self.streams], percentile)) * 1000

    def tpot_ms(self, percentile: float) -> float:
        """Mean time between a stream's tokens after the first, over streams."""
        means = [(s.end_s - s.first_token_s) / max(s.output_tokens - 1, 1) for s in self.streams]
        return float(np.percentile(means, percentile)) * 1000


async def run_load(plan: LoadPlan, num_streams: int) -> LoadResult:
    """Run `num_streams` at once. Raises httpx.HTTPError when any of them fails: a rate with holes is none."""
    headers = {"Authorization": f"Bearer {plan.api_key}"}
    limits = httpx.Limits(max_connections=num_streams)
    async with httpx.AsyncClient(
        base_url=plan.endpoint, headers=headers, timeout=TIMEOUT, limits=limits
    ) as client:
        model = plan.model or await _first_model(client)
        started = time.perf_counter()
        streams = await asyncio.gather(
            *(_stream(client, model, number, plan.max_tokens) for number in range(num_streams))
        )
        return LoadResult(num_streams, time.perf_counter() - started, tuple(streams))


async def _first_model(client: httpx.AsyncClient) -> str:
    response = await client.get("/v1/models")
    response.raise_for_status()
    return str(response.json()["data"][0]["id"])


async def _stream(client: httpx.AsyncClient, model: str, number: int, max_tokens: int) -> StreamTimes:
    body = {
        "model": model,
        # The number stands first, so that no two prompts share a block.
        "messages": [{"role": "user", "content": f"{number} is my number. Tell me a story."}],
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    started = time.perf_counter()
    first_token_s = 0.0
    output_tokens = 0
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line.removeprefix("data: "))
            if "error" in chunk:
                raise httpx.RemoteProtocolError(chunk["error"]["message"])
            if not first_token_s and any(choice["delta"].get("content") for choice in chunk["choices"]):
                first_token_s = time.perf_counter() - started
            if chunk.get("usage"):
                output_tokens = chunk["usage"]["completion_tokens"]
    return StreamTimes(first_token_s, time.perf_counter() - started, output_tokens)


def print_results(results: list[LoadResult], console: Console) -> None:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("streams", "tokens/s", "TTFT p50 ms", "TTFT p99 ms", "TPOT p50 ms", "TPOT p99 ms"):
        table.add_column(name, justify="right")
    for result in results:
        figures = (
            result.tokens_per_s,
            result.ttft_ms(50),
            result.ttft_ms(99),
            result.tpot_ms(50),
            result.tpot_ms(99),
        )
        table.add_row(str(result.num_streams), *(f"{figure:.1f}" for figure in figures))
    console.print(table)
