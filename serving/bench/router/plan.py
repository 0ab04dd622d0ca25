"""Which runs a comparison needs, and the doing of them in several processes."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from serving.bench.router.baselines import BASELINES
from serving.bench.router.figures import Objective, RunFigures
from serving.bench.router.policies import OMNISCIENT, OURS
from serving.bench.router.runs import Job, OracleHits, Scenario, Source, oracle_hits, run_job

FRESH, STALE, STALER, FULL = "fresh", "4 routers, 500 ms", "4 routers, 2 s", "95 % load"
TENANTS, OWN_REGION, JOINT = "10:1 tenants", "own region", "three regions"

USAGE_POLICY = "least KV"
"""The baseline that scores 1 - usage: who has the most KV blocks free."""

OVERLOAD = 1.5  # at which tenants compete
TENANT_RATES = (10.0, 1.0)
NUM_REGIONS = 3
REPLICAS_A_REGION = 5
REGION_LOAD = 0.47  # in the mean of the day; a region's peak is 1.8 times that
JOINT_REPLICAS = (12, 11, 10, 9)  # beside 15 that serve their own regions

R = TypeVar("R")
Done = Callable[[], None]


@dataclass(frozen=True, slots=True)
class ComparisonPlan:
    """`scenario` is the first one of a comparison; without `whole` it is the only one."""

    source: Source
    scenario: Scenario
    policies: tuple[str, ...]
    num_seeds: int
    objective: Objective
    whole: bool = False

    def scenarios(self) -> list[tuple[Scenario, tuple[str, ...]]]:
        """Each with the policies that run in it."""
        first = self.scenario
        if not self.whole:
            return [(first, self.policies)]
        fresh = replace(first, name=FRESH, num_routers=1, staleness_ms=0.0)
        routed = tuple(name for name in self.policies if name != OMNISCIENT)
        usage = tuple(name for name in (OURS, USAGE_POLICY) if name in self.policies)
        ours = (OURS,) if OURS in self.policies else ()
        day = replace(
            fresh,
            num_regions=NUM_REGIONS,
            load=REGION_LOAD,
            load_replicas=NUM_REGIONS * REPLICAS_A_REGION,
            num_replicas=NUM_REGIONS * REPLICAS_A_REGION,
        )
        return [
            (fresh, self.policies),
            (replace(fresh, name=STALE, num_routers=4, staleness_ms=500.0), routed),
            (replace(fresh, name=STALER, num_routers=4, staleness_ms=2000.0), ours),
            (replace(fresh, name=FULL, load=0.95), usage),
            (replace(fresh, name=TENANTS, load=OVERLOAD, tenant_rates=TENANT_RATES), ours),
            (replace(day, name=OWN_REGION, own_region_only=True), ours),
            *((replace(day, name=JOINT, num_replicas=number), ours) for number in JOINT_REPLICAS),
        ]

    def jobs(self) -> list[Job]:
        """Those of one scenario and seed together, since they share a workload."""
        return [
            Job(self.source, scenario, policy, seed, self.objective)
            for scenario, policies in self.scenarios()
            for seed in range(self.num_seeds)
            for policy in policies
        ]


def default_policies() -> tuple[str, ...]:
    return (OURS, OMNISCIENT, *BASELINES)


def run_all(
    plan: ComparisonPlan, num_processes: int, on_done: Done
) -> tuple[list[RunFigures], list[OracleHits]]:
    """Every job, and the oracles of the first scenario, in the plan's order; `on_done` after each.

    An error in one ends all. With one process everything happens in this one.
    """
    jobs, scenario = plan.jobs(), plan.scenarios()[0][0]
    oracles = [(plan.source, scenario, seed) for seed in range(plan.num_seeds)]
    if num_processes <= 1:
        runs = [_told(run_job(job), on_done) for job in jobs]
        return runs, [_told(oracle_hits(*args), on_done) for args in oracles]
    context = multiprocessing.get_context("spawn")
    with _one_thread_each(), ProcessPoolExecutor(num_processes, mp_context=context) as pool:
        running = [pool.submit(run_job, job) for job in jobs]
        asked = [pool.submit(oracle_hits, *args) for args in oracles]
        futures: list[Future[Any]] = [*running, *asked]
        try:
            _await_all(futures, on_done)
        finally:  # after an error nobody wants the rest
            for future in futures:
                future.cancel()
        return [future.result() for future in running], [future.result() for future in asked]


def _await_all(futures: Sequence[Future[Any]], on_done: Done) -> None:
    left = set(futures)
    while left:
        done, left = wait(left, return_when=FIRST_COMPLETED)
        for future in done:
            future.result()
            on_done()


def _told(result: R, on_done: Done) -> R:
    on_done()
    return result


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Numpy in the processes started here shall not compete with its own threads."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before
