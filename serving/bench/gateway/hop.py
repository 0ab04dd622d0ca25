"""The Router's hop beside a bare unary call of Serve, by turns: what routing adds to being asked at all.

The pick is asked for as Ingress does, and answered by the Router that serves. The bare call goes to a
deployment that answers with what it was sent, with the settings our deployments have, and carries as
many bytes as a pick's request.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
from ray import serve

from serving.bench.load.figures import Percentiles, percentiles
from serving.deploy import APPLICATION
from serving.direct_calls import DirectService, ray_tls
from serving.errors import SearoomError
from serving.messages import Route, RouteRequest, encode
from serving.ray_compat import ServiceHandle
from serving.router_link import RouterLink

PROBE = "probe"  # as an Ingress, and as an application
PROMPT_TOKENS = 1024
BLOCK_TOKENS = 16
WARM_UP_CALLS = 50
DEADLINE_S = 60.0


class Echo:
    """Answers with what it was sent."""

    async def echo(self, payload: bytes) -> bytes:
        return payload


class Hop(msgspec.Struct, frozen=True):
    """Milliseconds of calls, `concurrency` at once of each kind."""

    concurrency: int
    calls: int
    payload_bytes: int
    pick_ms: Percentiles
    bare_ms: Percentiles

    @property
    def added_ms(self) -> float:
        """What the median pick takes more than the median bare call."""
        return self.pick_ms.p50 - self.bare_ms.p50


async def measure_hop(model: str, concurrency: int, calls: int, on_progress: Callable[..., None]) -> Hop:
    """`calls` of each kind; `on_progress` hears of how many are `completed`.

    This process has joined the cluster, where the application runs. Raises SearoomError where the
    Router gives no Route.
    """
    bare = ServiceHandle(Echo.__name__, PROBE)
    router = RouterLink(DirectService(ServiceHandle("Router", APPLICATION), "Router", ray_tls()), PROBE)
    rng = np.random.default_rng(concurrency)
    pick_ms: list[float] = []
    bare_ms: list[float] = []
    payload = encode([_request(model, "size", rng)])

    async def take_turns(worker: int) -> None:
        number = 0
        while len(bare_ms) < calls + WARM_UP_CALLS:
            number += 1
            request = _request(model, f"{PROBE}-{concurrency}-{worker}-{number}", rng)
            begun_s = time.perf_counter()
            reply = await router.pick(request)
            pick_ms.append(1000 * (time.perf_counter() - begun_s))
            if not isinstance(reply, Route):
                raise SearoomError(f"the Router gave no Route: {reply}")
            await router.pick(msgspec.structs.replace(request, deadline_s=0.0))  # it is forgotten
            begun_s = time.perf_counter()
            await bare.call("echo", payload)
            bare_ms.append(1000 * (time.perf_counter() - begun_s))
            on_progress(completed=len(bare_ms))

    try:
        await asyncio.gather(*(take_turns(worker) for worker in range(concurrency)))
    finally:
        router.close()
    pick, plain = percentiles(pick_ms[WARM_UP_CALLS:]), percentiles(bare_ms[WARM_UP_CALLS:])
    assert pick is not None and plain is not None
    return Hop(concurrency, calls, len(payload), pick, plain)


def deploy_echo() -> None:
    """The deployment of the bare call, beside the application."""
    deployment: Any = serve.deployment(Echo)
    echo = deployment.options(
        max_ongoing_requests=10_000,
        ray_actor_options={"num_cpus": 0.01},
        logging_config={"enable_access_log": False},
    )
    serve.run(echo.bind(), name=PROBE, route_prefix=None)


def _request(model: str, request_id: str, rng: np.random.Generator) -> RouteRequest:
    return RouteRequest(
        request_id=request_id,
        ingress_id=PROBE,
        model=model,
        tenant_key=PROBE,
        deadline_s=time.time() + DEADLINE_S,
        prompt_tokens=PROMPT_TOKENS,
        max_tokens=16,
        block_hashes=tuple(rng.bytes(16) for _ in range(PROMPT_TOKENS // BLOCK_TOKENS)),
    )
