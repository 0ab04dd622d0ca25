"""What Searoom's routing is held against, and whether a report holds it. Pure.

Every ratio is taken seed by seed, on the very same requests, and its median over the seeds counts.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from serving.bench.engine.report import Verdict
from serving.bench.router.baselines import BASELINES
from serving.bench.router.figures import RunFigures
from serving.bench.router.plan import (
    FRESH,
    FULL,
    JOINT,
    NUM_REGIONS,
    OWN_REGION,
    REPLICAS_A_REGION,
    STALE,
    STALER,
    TENANTS,
    USAGE_POLICY,
)
from serving.bench.router.policies import OMNISCIENT, OURS
from serving.bench.router.report import Figure, Report

MIN_LRU_SHARE, MAX_OVER_MEAN = 0.95, 1.05
MAX_P50_OVER_O2, MAX_P99_OVER_O2 = 1.10, 1.25
MAX_P99_OVER_BEST, OR_P99_OVER_O2 = 0.75, 1.10
MAX_BEHIND_BEST = 1.02
MAX_GOODPUT_LOSS = 0.03
MIN_PREEMPTION_RATIO = 10.0
MAX_KV_COV = 0.10
MIN_JAIN = 0.98
MAX_GPU_SHARE, MAX_CROSS_REGION_SHARE = 0.80, 0.15


def verdicts(report: Report) -> list[Verdict]:
    """Every target that the report has the runs for; the rest are not mentioned."""
    if FRESH not in report.scenarios or not report.of(FRESH, OURS):
        return []
    found = [*_placement(report), *_latency(report), *_staleness(report), *_nowhere_behind(report)]
    return [*found, *_memory(report), *_fairness(report), *_regions(report)]


def _placement(report: Report) -> list[Verdict]:
    shares = []
    for run in report.of(FRESH, OURS):
        lru = report.lru_share(run.seed)
        shares.append(run.hit_share / lru if lru else math.nan)
    return [
        _at_least("prefix hits / those of one pooled LRU cache", MIN_LRU_SHARE, shares),
        _at_most(
            "prefill tokens of the busiest replica / mean",
            MAX_OVER_MEAN,
            [run.prefill_max_over_mean for run in report.of(FRESH, OURS)],
        ),
    ]


def _latency(report: Report) -> list[Verdict]:
    return [
        _at_most(
            f"TTFT {name} / the omniscient router's",
            limit,
            _ratios(report.of(FRESH, OURS), report.of(FRESH, OMNISCIENT), figure),
        )
        for name, limit, figure in (
            ("p50", MAX_P50_OVER_O2, _p50),
            ("p99", MAX_P99_OVER_O2, _p99),
        )
    ]


def _staleness(report: Report) -> list[Verdict]:
    ours = report.of(STALE, OURS)
    best = _best(report, STALE, _p99)
    of_best = _median(_ratios(ours, report.of(STALE, best), _p99)) if best else None
    of_o2 = _median(_ratios(ours, report.of(FRESH, OMNISCIENT), _p99))
    either = _holds_at_most(of_best, MAX_P99_OVER_BEST) or _holds_at_most(of_o2, OR_P99_OVER_O2)
    fresh, staler = report.of(FRESH, OURS), report.of(STALER, OURS)
    losses = [1 - late.goodput / run.goodput for run, late in zip(fresh, staler, strict=False) if run.goodput]
    return [
        Verdict(
            f"{STALE} stale: TTFT p99 / {best or 'the best baseline'}'s",
            f"<= {MAX_P99_OVER_BEST:.2f}, or",
            of_best,
            either if of_best is not None else None,
        ),
        Verdict(
            f"{STALE} stale: TTFT p99 / the fresh omniscient router's",
            f"<= {OR_P99_OVER_O2:.2f}",
            of_o2,
            either if of_o2 is not None else None,
        ),
        _at_most(f"goodput lost from 1 fresh router to {STALER} stale", MAX_GOODPUT_LOSS, losses),
    ]


def _nowhere_behind(report: Report) -> list[Verdict]:
    """In each scenario with baselines: the figure in which we are most behind the best of them."""
    found = []
    for scenario in (FRESH, STALE):
        behind: list[tuple[float, str]] = []
        for name, figure, is_cost in (
            ("TTFT p50", _p50, True),
            ("TTFT p99", _p99, True),
            ("goodput", _goodput, False),
        ):
            best = _best(report, scenario, figure, is_cost)
            if best is None:
                continue
            pair = (report.of(scenario, OURS), report.of(scenario, best))
            ratio = _median(_ratios(*(pair if is_cost else pair[::-1]), figure))
            if ratio is not None:
                behind.append((ratio, f"{name} beside {best}'s"))
        worst, what = max(behind, default=(None, "the best baseline of each figure"))
        holds = None if worst is None else worst <= MAX_BEHIND_BEST
        found.append(Verdict(f"{scenario}: most behind, {what}", f"<= {MAX_BEHIND_BEST:.2f}", worst, holds))
    return found


def _memory(report: Report) -> list[Verdict]:
    ours = sum(run.preemptions_per_100 for run in report.of(FULL, OURS))
    others = sum(run.preemptions_per_100 for run in report.of(FULL, USAGE_POLICY))
    ratio = (others / ours if ours else math.inf) if others else None
    return [
        Verdict(
            f"95 % load: preemptions of {USAGE_POLICY} / ours",
            f">= {MIN_PREEMPTION_RATIO:.0f}",
            ratio,
            None if ratio is None else ratio >= MIN_PREEMPTION_RATIO,
        ),
        _at_most(
            "variation of KV use over the replicas, time mean",
            MAX_KV_COV,
            [run.kv_cov for run in report.of(FRESH, OURS)],
        ),
    ]


def _fairness(report: Report) -> list[Verdict]:
    jains = [run.jain for run in report.of(TENANTS, OURS)]
    return [_at_least("two tenants, 10:1, at 150 % load: Jain's index", MIN_JAIN, jains)]


def _regions(report: Report) -> list[Verdict]:
    """The fewest replicas that serve all regions together as well as each serves itself."""
    own = report.of(OWN_REGION, OURS)
    if not own:
        return []
    needed = _median([run.goodput for run in own]) or 0.0
    total = NUM_REGIONS * REPLICAS_A_REGION
    sizes = sorted({run.num_replicas for run in report.of(JOINT, OURS)})
    good = [
        size
        for size in sizes
        if (_median([run.goodput for run in report.of(JOINT, OURS, size)]) or 0.0) >= needed
    ]
    fewest = good[0] if good else None
    crossing = [
        run.cross_region_share for run in report.of(JOINT, OURS, fewest if good else max(sizes, default=0))
    ]
    share = fewest / total if fewest else math.inf
    return [
        Verdict(
            f"three regions together: replicas for the goodput ({needed:.1%}) of {total} each in its own",
            f"<= {MAX_GPU_SHARE:.2f}",
            share,
            share <= MAX_GPU_SHARE,
        ),
        _at_most("of their requests, served in another region", MAX_CROSS_REGION_SHARE, crossing),
    ]


def _best(report: Report, scenario: str, figure: Figure, is_cost: bool = True) -> str | None:
    """The baseline with the best median; the omniscient router is none."""
    sign = 1 if is_cost else -1
    medians = [
        (sign * value, name)
        for name in report.policies(scenario)
        if name in BASELINES and (value := report.median(scenario, name, figure)) is not None
    ]
    return min(medians)[1] if medians else None


def _ratios(ours: Sequence[RunFigures], others: Sequence[RunFigures], figure: Figure) -> list[float]:
    """Seed by seed; infinite where only ours is, 1 where both are."""
    found = []
    for run, other in zip(ours, others, strict=False):
        assert run.seed == other.seed
        above, below = figure(run), figure(other)
        if above is None or below is None:
            continue
        if math.isinf(above) and math.isinf(below):
            found.append(1.0)
        else:
            found.append(above / below if below else math.inf)
    return found


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None and not math.isnan(value)]
    return statistics.median(known) if known else None


def _holds_at_most(value: float | None, limit: float) -> bool:
    return value is not None and value <= limit


def _at_most(what: str, limit: float, values: Sequence[float | None]) -> Verdict:
    value = _median(values)
    return Verdict(what, f"<= {limit:.2f}", value, None if value is None else value <= limit)


def _at_least(what: str, limit: float, values: Sequence[float | None]) -> Verdict:
    value = _median(values)
    return Verdict(what, f">= {limit:.2f}", value, None if value is None else value >= limit)


def _p50(run: RunFigures) -> float:
    return run.ttft_p50_s


def _p99(run: RunFigures) -> float:
    return run.ttft_p99_s


def _goodput(run: RunFigures) -> float:
    return run.goodput
