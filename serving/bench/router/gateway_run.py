"""A real gateway before mock workers, sent one request at a time: which worker got which.

Nothing races: a request is sent when the one before it has arrived at its worker, and after an answer
the gateway is asked until it counts one request in flight less. So its loads are those of the log.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx

from serving.bench.router.gateway_workers import MODEL, MockWorkers, named

SETTLE_S = 0.002  # between two questions whether it has noted that an answer is through
SETTLE_TIMEOUT_S = 5.0
START_TIMEOUT_S = 60.0
REQUEST_TIMEOUT_S = 120.0

ARGUMENTS: dict[str, tuple[str, ...]] = {
    "smg": ("-m", "smg.launch_router"),
    "vllm-router": ("-m", "vllm_router.launch_router"),
    "sglang-router": ("-m", "sglang_router.launch_router"),
}
"""What starts a gateway, by the name of its distribution."""


class GatewayFailed(Exception):
    """It does not start, or lost a request; says its last words."""


@dataclass(frozen=True, slots=True)
class Send:
    number: int
    text: str


@dataclass(frozen=True, slots=True)
class End:
    """The worker answers this request."""

    number: int


Step = Send | End


async def picks_of(
    gateway: str, python: Path, steps: Sequence[Step], num_workers: int, on_step: Callable[[], None]
) -> dict[int, int]:
    """The worker of every request, by its number. Raises GatewayFailed."""
    picks: dict[int, int] = {}
    async with MockWorkers(num_workers) as workers, _running(gateway, python, workers.urls) as url:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        async with httpx.AsyncClient(base_url=url, limits=limits, timeout=REQUEST_TIMEOUT_S) as client:
            answers: dict[int, asyncio.Task[httpx.Response]] = {}
            for step in steps:
                if isinstance(step, End):
                    workers.release(step.number)
                    _checked(await answers.pop(step.number))
                    await _settled(client, len(answers))
                else:
                    answers[step.number] = asyncio.create_task(_send(client, step))
                    picks[step.number] = await _arrived(workers, answers[step.number], step.number)
                on_step()
            for number, answer in answers.items():
                workers.release(number)
                _checked(await answer)
    return picks


async def _send(client: httpx.AsyncClient, step: Send) -> httpx.Response:
    body = {"model": MODEL, "prompt": named(step.text, step.number), "max_tokens": 1}
    return await client.post("/v1/completions", json=body)


async def _arrived(workers: MockWorkers, answer: asyncio.Task[httpx.Response], number: int) -> int:
    arrival = asyncio.create_task(workers.arrival())
    await asyncio.wait({arrival, answer}, return_when=asyncio.FIRST_COMPLETED)
    if not arrival.done():
        arrival.cancel()
        raise GatewayFailed(f"request {number} reached no worker: {answer.result().text[:300]}")
    try:
        worker, arrived = arrival.result()
    except TimeoutError:
        raise GatewayFailed(f"request {number} reached no worker in time") from None
    if arrived != number:
        raise GatewayFailed(f"request {arrived} arrived when {number} was sent: the gateway tries again")
    return worker


async def _settled(client: httpx.AsyncClient, in_flight: int) -> None:
    """Returns when the gateway counts so many requests in flight. Raises TimeoutError."""
    async with asyncio.timeout(SETTLE_TIMEOUT_S):
        while await _in_flight(client) != in_flight:  # noqa: ASYNC110  only the gateway knows
            await asyncio.sleep(SETTLE_S)


async def _in_flight(client: httpx.AsyncClient) -> int:
    return sum(worker["load"] for worker in (await client.get("/workers")).json()["workers"])


def _checked(response: httpx.Response) -> None:
    if response.status_code != 200:
        raise GatewayFailed(f"an answer with status {response.status_code}: {response.text[:300]}")


@contextlib.asynccontextmanager
async def _running(gateway: str, python: Path, worker_urls: Sequence[str]) -> AsyncIterator[str]:
    """The gateway's URL, when it has found all its workers; it is ended with the block."""
    port, metrics_port = _free_port(), _free_port()
    with tempfile.TemporaryFile() as log:
        process = await asyncio.create_subprocess_exec(
            python,
            *ARGUMENTS[gateway],
            *("--host", "127.0.0.1", "--port", str(port), "--prometheus-port", str(metrics_port)),
            *("--policy", "cache_aware", "--worker-urls", *worker_urls),
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            url = f"http://127.0.0.1:{port}"
            if not await _ready(url, process, len(worker_urls)):
                log.seek(0)
                words = log.read()[-2000:].decode(errors="replace")
                raise GatewayFailed(f"{gateway} did not get ready; its last words:\n{words}")
            yield url
        finally:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)  # nothing of it is to be kept
            await process.wait()


async def _ready(url: str, process: asyncio.subprocess.Process, num_workers: int) -> bool:
    deadline = asyncio.get_running_loop().time() + START_TIMEOUT_S
    async with httpx.AsyncClient(base_url=url, timeout=2.0) as client:
        while asyncio.get_running_loop().time() < deadline and process.returncode is None:
            with contextlib.suppress(httpx.HTTPError):
                readiness = await client.get("/readiness")
                if readiness.status_code == 200 and readiness.json()["healthy_workers"] == num_workers:
                    return True
            await asyncio.sleep(0.2)
    return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
