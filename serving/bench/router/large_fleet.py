"""One run of our policy in a fleet as large as is wished: what its requests get, and what it costs to decide.

The load is the generator's, so many requests a replica and not a share of the fleet's capacity: near
that, ten thousand replicas would take millions of requests a minute. What share it comes to is worked
out on a sample, a fleet of `SAMPLE_REPLICAS` with as much load a replica.
"""

from __future__ import annotations

import resource
import shlex
import sys
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import msgspec
from rich.console import Console

from serving.bench.commands import progress_bar
from serving.bench.router.capacity import work_of
from serving.bench.router.figures import Objective, RunFigures, figures_of
from serving.bench.router.generated import GeneratorPlan, generate
from serving.bench.router.policies import OURS, searoom
from serving.bench.router.reference_fleet import BLOCK_TOKENS
from serving.bench.router.runs import Scenario
from serving.messages import RouteReply, RouteRequest
from serving.simulator import Policy, SimSetup, simulate

REQUESTS_A_REPLICA = 10
LEAD_S = 60.0  # sessions that began so long before the first request are in their later turns
SAMPLE_REPLICAS = 100


class LargeFleetReport(msgspec.Struct, frozen=True, kw_only=True):
    """Infinite times (too many refusals) are null in the JSON. CPU times are this process's."""

    date: str
    command: str
    num_replicas: int
    num_requests: int
    load_s: float  # in which the requests arrive
    utilisation: float  # of the fleet's capacity, by `capacity.work_of`
    objective: Objective
    figures: RunFigures
    simulated_s: float  # until the last request had ended
    counts: dict[str, int]  # of what the simulation did
    num_decisions: int  # more than there are requests, where some were refused and asked again
    decision_cpu_ms: float  # mean
    generating_cpu_s: float
    wall_s: float  # of the simulation alone, as is:
    cpu_s: float
    peak_memory_gib: float  # of this process, requests and simulated replicas included


class TimedPolicy:
    """A policy whose decisions are timed; no clock is read at other calls, of which there are millions."""

    def __init__(self, policy: Policy) -> None:
        self.num_decisions = 0
        self.decision_cpu_s = 0.0
        self._policy = policy
        self.replica_reported = policy.replica_reported
        self.replica_events = policy.replica_events
        self.update = policy.update
        self.membership = policy.membership
        self.tick = policy.tick

    def request(self, request: RouteRequest, now: float) -> RouteReply:
        start_s = time.process_time()
        reply = self._policy.request(request, now)
        self.decision_cpu_s += time.process_time() - start_s
        self.num_decisions += 1
        return reply


def run_large_fleet(
    num_replicas: int,
    load_s: float,
    num_requests: int | None,
    objective: Objective,
    console: Console,
    json_file: Path | None,
) -> None:
    """Simulate it with a progress bar, and print and write what was found."""
    report = measure(
        num_replicas, load_s, num_requests or REQUESTS_A_REPLICA * num_replicas, objective, console
    )
    _print(report, console)
    if json_file is not None:
        json_file.write_bytes(msgspec.json.format(msgspec.json.encode(report)) + b"\n")


def measure(
    num_replicas: int, load_s: float, num_requests: int, objective: Objective, console: Console
) -> LargeFleetReport:
    """Deterministic but for times and memory."""
    scenario = Scenario(f"{num_replicas} replicas", num_replicas=num_replicas)
    setup = scenario.setup(seed=0)
    plan = GeneratorPlan(num_requests=num_requests, span_s=load_s, lead_s=LEAD_S)
    start_s = time.process_time()
    with console.status(f"generating {num_requests} requests"):
        utilisation = _utilisation(plan, scenario)
        requests = generate(plan, BLOCK_TOKENS, seed=0).requests
    generating_cpu_s = time.process_time() - start_s
    timed: list[TimedPolicy] = []

    def make_policy(number: int, setup: SimSetup) -> TimedPolicy:
        timed.append(TimedPolicy(searoom(number, setup)))
        return timed[-1]

    wall_start_s, start_s = time.monotonic(), time.process_time()
    with progress_bar(console) as progress:
        task = progress.add_task("requests answered", total=len(requests))
        result = simulate(
            setup, requests, make_policy, lambda done, total: progress.update(task, completed=done)
        )
    wall_s, cpu_s = time.monotonic() - wall_start_s, time.process_time() - start_s
    (policy,) = timed
    return LargeFleetReport(
        date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        command=f"python -m serving.bench {shlex.join(sys.argv[1:])}",
        num_replicas=num_replicas,
        num_requests=len(requests),
        load_s=load_s,
        utilisation=utilisation,
        objective=objective,
        figures=figures_of(
            scenario.name, OURS, 0, requests, result, objective, run_s=wall_s, num_replicas=num_replicas
        ),
        simulated_s=result.duration_s,
        counts=dict(result.counts),
        num_decisions=policy.num_decisions,
        decision_cpu_ms=1e3 * policy.decision_cpu_s / policy.num_decisions,
        generating_cpu_s=generating_cpu_s,
        wall_s=wall_s,
        cpu_s=cpu_s,
        peak_memory_gib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20),
    )


def _utilisation(plan: GeneratorPlan, scenario: Scenario) -> float:
    """Of the fleet's capacity; by a sample where the fleet is large."""
    num_replicas = min(scenario.num_replicas, SAMPLE_REPLICAS)
    num_requests = -(-plan.num_requests * num_replicas // scenario.num_replicas)
    sample = generate(replace(plan, num_requests=num_requests), BLOCK_TOKENS, seed=0)
    setup = replace(scenario, num_replicas=num_replicas).setup(seed=0)
    return work_of(sample, setup).utilisation(num_replicas, plan.span_s)


def _print(report: LargeFleetReport, console: Console) -> None:
    figures, objective = report.figures, report.objective
    refused = round((1 - figures.served_share) * report.num_requests)
    lines = (
        f"{report.num_replicas:,} replicas, {report.num_requests:,} requests in {report.load_s:g} s "
        f"({report.num_requests / report.load_s:,.0f} a second, {report.utilisation:.1%} of capacity), "
        f"the last one answered after {report.simulated_s:.1f} s",
        f"TTFT p50 {figures.ttft_p50_s:.3f} s, p99 {figures.ttft_p99_s:.3f} s; TPOT p50 "
        f"{figures.tpot_p50_ms:.1f} ms, p99 {figures.tpot_p99_ms:.1f} ms; goodput {figures.goodput:.2%} "
        f"(TTFT at most {objective.ttft_s:g} s, TPOT at most {objective.tpot_ms:g} ms)",
        f"{refused} requests not served, {figures.refusals_per_100:.2f} refusals by replicas and "
        f"{figures.preemptions_per_100:.2f} preemptions of 100 requests; hits {figures.hit_share:.1%} of "
        f"the prompts' blocks",
        f"{report.num_decisions:,} decisions of {report.decision_cpu_ms:.3f} ms CPU in the mean, "
        f"{report.counts['reports']:,} reports and {report.counts['block_events']:,} block events taken in",
        f"simulated in {report.wall_s:.0f} s, {report.cpu_s:.0f} s CPU, besides "
        f"{report.generating_cpu_s:.0f} s to generate; peak memory {report.peak_memory_gib:.1f} GiB",
    )
    for line in lines:
        console.print(line, highlight=False)
