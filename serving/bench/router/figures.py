"""The figures of one simulated run. Pure.

A request that was refused, lost or late counts as a time of infinity in every percentile and as a miss
of goodput, so that nobody gains by refusing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from serving.bench.router.oracles import prompt_blocks
from serving.simulator import DONE, SimRequest, SimResult

OUTPUT_WEIGHT = 2.0
"""Service to a tenant: its prompt tokens, and its output tokens at this weight, as VTC counts them."""

_MIN_MEAN_UTILISATION = 0.05  # a fleet emptier than this has no balance to speak of


class Objective(msgspec.Struct, frozen=True):
    """What goodput asks of a request: both."""

    ttft_s: float = 2.0
    tpot_ms: float = 100.0


class RunFigures(msgspec.Struct, frozen=True, kw_only=True):
    """One policy on one workload with one seed. Shares are of 1; None where nothing was to be said."""

    scenario: str
    policy: str
    seed: int
    num_requests: int
    served_share: float
    hit_share: float  # prompt blocks found in a cache, of all prompts' full blocks
    prefill_max_over_mean: float  # prefill tokens a replica
    ttft_p50_s: float
    ttft_p99_s: float
    tpot_p50_ms: float
    tpot_p99_ms: float
    goodput: float  # requests within the objective, of all
    preemptions_per_100: float
    refusals_per_100: float  # by replicas
    kv_utilisation: float  # mean over time and replicas
    kv_cov: float | None  # over replicas, mean over time
    jain: float | None  # over tenants; see `jain_of_tenants`
    cross_region_share: float | None  # of the served; None with one region
    busy_share: float  # of the replicas' time until the last arrival, at most 1
    run_s: float = 0.0  # that the simulation took
    load: float = 0.0
    num_replicas: int = 0
    cached_blocks: int = 0


def figures_of(
    scenario: str,
    policy: str,
    seed: int,
    requests: Sequence[SimRequest],
    result: SimResult,
    objective: Objective,
    **facts: Any,
) -> RunFigures:
    """`facts` are the fields of RunFigures that a result does not tell."""
    done = result.outcome == DONE
    block_tokens = result.setup.block_tokens
    num = max(1, len(requests))
    cached_blocks = int(result.cached_tokens[done].sum()) // block_tokens
    all_blocks = prompt_blocks(requests)
    tpot_ms = result.tpot_s * 1e3
    several = done & ~np.isnan(tpot_ms)
    span_s = max((request.arrival_s for request in requests), default=0.0)
    within = done & (result.ttft_s <= objective.ttft_s) & (np.isnan(tpot_ms) | (tpot_ms <= objective.tpot_ms))
    return RunFigures(
        scenario=scenario,
        policy=policy,
        seed=seed,
        num_requests=len(requests),
        served_share=float(done.mean()) if len(requests) else 1.0,
        hit_share=cached_blocks / all_blocks if all_blocks else 0.0,
        prefill_max_over_mean=max_over_mean(result.prefill_tokens),
        ttft_p50_s=percentile(result.ttft_s, done, 50),
        ttft_p99_s=percentile(result.ttft_s, done, 99),
        tpot_p50_ms=percentile(tpot_ms[several | ~done], done[several | ~done], 50),
        tpot_p99_ms=percentile(tpot_ms[several | ~done], done[several | ~done], 99),
        goodput=float(within.sum()) / num,
        preemptions_per_100=100 * float(result.preemptions.sum()) / num,
        refusals_per_100=100 * float(result.refusals.sum()) / num,
        kv_utilisation=float(np.mean(result.kv_utilisation)),
        kv_cov=time_mean_cov(result.kv_utilisation_series[: int(span_s) + 1]),
        jain=jain_of_tenants(requests, result, span_s),
        cross_region_share=cross_region_share(requests, result),
        busy_share=min(1.0, float(result.busy_s.sum()) / (len(result.busy_s) * max(span_s, 1e-9))),
        cached_blocks=cached_blocks,
        **facts,
    )


def percentile(values: NDArray[np.float64], is_valid: NDArray[np.bool_], percent: float) -> float:
    """The smallest value that so many percent do not exceed; whoever is not valid counts as infinity."""
    if len(values) == 0:
        return math.nan
    ordered = np.sort(np.where(is_valid, values, np.inf))
    rank = max(1, math.ceil(percent / 100 * len(ordered)))
    return float(ordered[rank - 1])


def max_over_mean(values: NDArray[np.int64]) -> float:
    mean = float(np.mean(values))
    return float(np.max(values)) / mean if mean > 0 else 1.0


def time_mean_cov(utilisation: NDArray[np.float32]) -> float | None:
    """Coefficient of variation over the replicas [S, N], in the mean over the seconds with load."""
    if utilisation.shape[0] == 0:
        return None
    means = utilisation.mean(axis=1)
    loaded = means >= _MIN_MEAN_UTILISATION
    if not loaded.any():
        return None
    return float((utilisation.std(axis=1)[loaded] / means[loaded]).mean())


def jain(shares: NDArray[np.float64]) -> float:
    """(Σ x)² / (n · Σ x²): 1 when all are equal, 1/n when one has everything (Jain et al. 1984)."""
    squares = float((shares**2).sum())
    return float(shares.sum()) ** 2 / (len(shares) * squares) if squares > 0 else 1.0


def jain_of_tenants(requests: Sequence[SimRequest], result: SimResult, span_s: float) -> float | None:
    """Jain's index of what each tenant was served over what max-min fairness grants it; None for one tenant.

    Service is of requests that ended while requests still arrived, in prompt and weighted output
    tokens. The grant divides all that was served so that nobody gets more than it asked for and
    nobody who wants more has less than another.
    """
    tenants = sorted({request.tenant for request in requests})
    if len(tenants) < 2:
        return None
    place = {tenant: index for index, tenant in enumerate(tenants)}
    asked, served = np.zeros(len(tenants)), np.zeros(len(tenants))
    ended = (result.outcome == DONE) & (
        np.array([request.arrival_s for request in requests]) + np.nan_to_num(result.e2e_s) <= span_s
    )
    for request, in_time in zip(requests, ended, strict=True):
        tokens = request.prompt_tokens + OUTPUT_WEIGHT * min(request.output_tokens, request.max_tokens)
        asked[place[request.tenant]] += tokens
        served[place[request.tenant]] += tokens * bool(in_time)
    grants = max_min_grants(asked, float(served.sum()))
    return jain(served[grants > 0] / grants[grants > 0])


def max_min_grants(asked: NDArray[np.float64], total: float) -> NDArray[np.float64]:
    """`total`, at most what is asked, divided by raising everybody's share alike until it is met."""
    grants = np.zeros(len(asked))
    left = min(total, float(asked.sum()))
    for done, index in enumerate(np.argsort(asked)):
        grants[index] = min(asked[index], left / (len(asked) - done))
        left -= grants[index]
    return grants


def cross_region_share(requests: Sequence[SimRequest], result: SimResult) -> float | None:
    """Served requests whose replica was in another region than their client; None with one region."""
    if len(result.regions) < 2:
        return None
    number = {region: index for index, region in enumerate(result.regions)}
    homes = np.array([number[request.region] for request in requests])
    done = result.outcome == DONE
    return float((result.region[done] != homes[done]).mean()) if done.any() else 0.0
