"""Requests a CPU-second of Ingress and Router together, counted by clients at the public endpoint."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

import msgspec

from serving.bench.gateway.processes import INGRESS, ROLES, ROUTER, read_clock
from serving.bench.load.client import Target
from serving.bench.load.figures import Percentiles, percentiles
from serving.bench.load.run import Limits, Run
from serving.bench.load.sessions import stories
from serving.errors import SearoomError

PERIOD_S = 0.5


class Throughput(msgspec.Struct, frozen=True):
    """`cpu_s` is what each role of process used in the window, of which the requests ended in it."""

    streams: int
    max_tokens: int
    window_s: float
    requests: int
    cpu_s: dict[str, float]
    client_cpu_s: float  # this program's, which shares the machine's cores, in the whole run
    ttft_ms: Percentiles | None

    @property
    def requests_per_s(self) -> float:
        return self.requests / self.window_s

    @property
    def requests_per_cpu_s(self) -> float:
        """Of Ingress and Router together."""
        return self.requests / max(self.cpu_s[INGRESS] + self.cpu_s[ROUTER], 1e-9)

    def cpu_ms_a_request(self) -> Mapping[str, float]:
        return {role: 1000 * self.cpu_s[role] / self.requests for role in ROLES}


async def measure_throughput(
    target: Target,
    streams: int,
    max_tokens: int,
    warm_up_s: float,
    window_s: float,
    on_progress: Callable[[float, int], None],
) -> Throughput:
    """A closed loop of `streams`; the window begins after the warm-up, and ends while all still send.

    `on_progress` hears of the seconds since the start and of the requests answered. Raises
    SearoomError where a request failed: its cost would be counted, and its answer would not.
    """
    run = Run(target, Limits(duration_s=warm_up_s + window_s + PERIOD_S))
    load = asyncio.create_task(run.closed_loop(stories(max_tokens), streams))
    try:
        await _wait_until(warm_up_s, run, on_progress)
        before, from_s = read_clock(), run.now_s()
        await _wait_until(from_s + window_s, run, on_progress)
        cpu_s, until_s = read_clock().since(before), run.now_s()
        await load
    finally:
        load.cancel()
    for record in run.records:
        if record.state != "ok":
            raise SearoomError(f"a request of the measurement {record.state}: {record.kind} {record.message}")
    ended = [record for record in run.records if from_s <= record.end_s < until_s]
    if not ended:
        raise SearoomError(f"no request ended within {window_s:g} s; measure for longer")
    return Throughput(
        streams=streams,
        max_tokens=max_tokens,
        window_s=until_s - from_s,
        requests=len(ended),
        cpu_s=cpu_s,
        client_cpu_s=run.cpu_s,
        ttft_ms=percentiles(record.ttft_ms for record in ended),
    )


async def _wait_until(end_s: float, run: Run, on_progress: Callable[[float, int], None]) -> None:
    while (left_s := end_s - run.now_s()) > 0:
        await asyncio.sleep(min(PERIOD_S, left_s))
        on_progress(run.now_s(), sum(record.state == "ok" for record in run.records))
