"""One run: which workload, fleet and policy, and the doing of it in whatever process.

A `Job` is all that a worker process is told; it makes the workload itself, from the seed.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import msgspec

from serving.bench.router.capacity import at_load, num_blocks, work_of
from serving.bench.router.figures import Objective, RunFigures, figures_of
from serving.bench.router.generated import GeneratorPlan, generate
from serving.bench.router.oracles import belady, pooled_lru
from serving.bench.router.policies import POLICIES, own_region_only
from serving.bench.router.reference_fleet import BLOCK_TOKENS, KV_TOKENS, REGION_NAMES, fleet
from serving.bench.router.traces import read_trace
from serving.bench.router.workload import Window, Workload, in_regions, with_tenants
from serving.errors import ConfigError
from serving.simulator import SimSetup, simulate

ONE_REGION = ("local",)
REGIONAL_DAY_DEPTH = 0.8
FITTING_ROUNDS = 3
MIN_SPAN_S = 10.0


@dataclass(frozen=True, slots=True)
class Source:
    """Where requests come from: a trace file, or (None) the generator."""

    trace: Path | None = None
    raw_times: bool = False
    num_requests: int = 2000  # a run; of a trace, each seed has its own window; 0: all of it
    num_seeds: int = 1  # that share the trace

    @property
    def name(self) -> str:
        return "generated" if self.trace is None else self.trace.stem


@dataclass(frozen=True, slots=True)
class Scenario:
    """A load on a fleet, and what its routers know of it. All policies see the very same."""

    name: str
    load: float = 0.85  # of the fleet's capacity, see capacity.py
    num_replicas: int = 8
    num_regions: int = 1
    num_routers: int = 1  # in each region
    staleness_ms: float = 0.0
    tenant_rates: tuple[float, ...] = ()  # empty: the source's own tenants
    own_region_only: bool = False
    load_replicas: int = 0  # the fleet that `load` is of, if not this one
    block_tokens: int = BLOCK_TOKENS
    kv_tokens: int = KV_TOKENS

    def setup(self, seed: int) -> SimSetup:
        return fleet(
            self.num_replicas,
            self.regions,
            block_tokens=self.block_tokens,
            kv_tokens=self.kv_tokens,
            num_routers=self.num_routers,
            staleness_ms=self.staleness_ms,
            seed=seed,
        )

    @property
    def regions(self) -> tuple[str, ...]:
        if self.num_regions == 1:
            return ONE_REGION
        if not 1 < self.num_regions <= len(REGION_NAMES):
            raise ConfigError(f"--regions {self.num_regions}: 1 to {len(REGION_NAMES)} are known")
        return REGION_NAMES[: self.num_regions]

    @property
    def of_fleet(self) -> Scenario:
        """The same load on the fleet that it is measured by, its routers aside: names a workload."""
        return replace(
            self,
            name="",
            num_replicas=self.load_replicas or self.num_replicas,
            load_replicas=0,
            num_routers=1,
            staleness_ms=0.0,
            own_region_only=False,
        )


@dataclass(frozen=True, slots=True)
class Job:
    source: Source
    scenario: Scenario
    policy: str
    seed: int
    objective: Objective


class OracleHits(msgspec.Struct, frozen=True, kw_only=True):
    """Hits of one cache of the whole fleet's blocks, as shares of all prompts' blocks."""

    scenario: str
    seed: int
    lru_share: float
    belady_share: float
    notes: tuple[str, ...]


def run_job(job: Job) -> RunFigures:
    """Simulate it; deterministic but for `run_s`."""
    scenario = job.scenario
    workload, setup = workload_of(job.source, scenario, job.seed), scenario.setup(job.seed)
    make_policy = POLICIES[job.policy]
    if scenario.own_region_only:
        make_policy = own_region_only(make_policy)
    start_s = time.perf_counter()
    result = simulate(setup, workload.requests, make_policy)
    return figures_of(
        scenario.name,
        job.policy,
        job.seed,
        workload.requests,
        result,
        job.objective,
        run_s=time.perf_counter() - start_s,
        load=scenario.load,
        num_replicas=scenario.num_replicas,
    )


def oracle_hits(source: Source, scenario: Scenario, seed: int) -> OracleHits:
    """Both pooled caches on the requests of this scenario and seed."""
    workload, setup = workload_of(source, scenario, seed), scenario.setup(seed)
    blocks = num_blocks(setup)
    return OracleHits(
        scenario=scenario.name,
        seed=seed,
        lru_share=pooled_lru(workload.requests, blocks, setup.block_tokens).share,
        belady_share=belady(workload.requests, blocks, setup.block_tokens).share,
        notes=workload.notes,
    )


def workload_of(source: Source, scenario: Scenario, seed: int) -> Workload:
    """The requests that every policy gets in this scenario with this seed."""
    return _workload_of(source, scenario.of_fleet, seed)


@lru_cache(maxsize=2)
def _workload_of(source: Source, scenario: Scenario, seed: int) -> Workload:
    regions = scenario.regions
    setup = scenario.setup(seed)
    if source.trace is None:
        workload = _generated(source, scenario, setup, seed)
    else:
        window = Window(seed, source.num_seeds, source.num_requests)
        workload = read_trace(source.trace, scenario.block_tokens, seed, source.raw_times, window)
        if len(regions) > 1:
            workload = in_regions(workload, regions, seed)
    if scenario.tenant_rates:
        workload = with_tenants(workload, scenario.tenant_rates, seed)
    return at_load(workload, setup, scenario.load)


def _generated(source: Source, scenario: Scenario, setup: SimSetup, seed: int) -> Workload:
    """With sessions so close to each other that the load is nearly met, and pauses stay what they are."""
    regions = scenario.regions
    plan = GeneratorPlan(num_requests=source.num_requests, regions=regions)
    if len(regions) > 1:
        plan = replace(plan, day_depth=REGIONAL_DAY_DEPTH)
    for _ in range(FITTING_ROUNDS):
        workload = generate(plan, scenario.block_tokens, seed)
        factor = work_of(workload, setup).utilisation(len(setup.replicas), workload.span_s) / scenario.load
        plan = replace(plan, span_s=max(MIN_SPAN_S, plan.span_s * factor))
    return generate(plan, scenario.block_tokens, seed)
