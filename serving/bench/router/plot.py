"""The comparison as a picture. It alone needs matplotlib, the extra `searoom[bench]`."""

from __future__ import annotations

import math
import statistics
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from serving.bench.router.policies import OMNISCIENT, OURS
from serving.bench.router.report import Report

_OURS, _ORACLE, _PEER = "tab:blue", "tab:gray", "tab:orange"
_MAX_SCENARIOS = 2  # those that have all policies


def write_plot(report: Report, path: Path) -> None:
    """Times to first token a policy in each scenario with several, hits against balance, as a PNG."""
    scenarios = [name for name in report.scenarios if len(report.policies(name)) > 1][:_MAX_SCENARIOS]
    shown = scenarios or report.scenarios[:1]
    figure = Figure(figsize=(6.0 * (len(shown) + 1), 6.0), layout="tight")
    axes = figure.subplots(1, len(shown) + 1, squeeze=False)[0]
    for place, scenario in zip(axes, shown, strict=False):
        _plot_times(report, scenario, place)
    _plot_placement(report, report.scenarios[0], axes[-1])
    figure.suptitle(f"{report.workload}: {len({run.seed for run in report.runs})} seeds")
    figure.savefig(path, dpi=150, format="png")


def _plot_times(report: Report, scenario: str, axes: Axes) -> None:
    """p50 as a dot, p99 as a line from the least to the most seed with a tick at their median."""
    policies = sorted(
        report.policies(scenario),
        key=lambda policy: report.median(scenario, policy, lambda run: run.ttft_p99_s) or math.inf,
    )
    for height, policy in enumerate(policies):
        runs = report.of(scenario, policy)
        p50_s = statistics.median(run.ttft_p50_s for run in runs)
        p99s_s = sorted(run.ttft_p99_s for run in runs)
        colour = _colour(policy)
        axes.plot(p50_s, height, marker="o", color=colour)
        finite_s = [value for value in p99s_s if math.isfinite(value)]
        if finite_s:
            axes.plot([finite_s[0], finite_s[-1]], [height, height], color=colour)
            axes.plot(statistics.median(finite_s), height, marker="|", markersize=14, color=colour)
    axes.set_yticks(range(len(policies)), policies)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("")
    axes.set_xlabel("TTFT in seconds: p50 as a dot, p99 as a line over the seeds")
    axes.set_title(scenario)
    axes.grid(visible=True, axis="x", alpha=0.3)


def _plot_placement(report: Report, scenario: str, axes: Axes) -> None:
    """What each policy found in caches, against how unevenly it spread the rest."""
    for policy in report.policies(scenario):
        runs = report.of(scenario, policy)
        hits = statistics.median(run.hit_share for run in runs)
        uneven = statistics.median(run.prefill_max_over_mean for run in runs)
        axes.plot(uneven, hits, marker="o", color=_colour(policy))
        axes.annotate(policy, (uneven, hits), xytext=(4, 3), textcoords="offset points", fontsize=8)
    for (name, share), style in zip(_pooled(report), ("--", ":"), strict=False):
        axes.axhline(share, linestyle=style, color=_ORACLE, label=name)
    axes.set_xlabel("prefill tokens of the busiest replica / mean")
    axes.set_ylabel("prompt blocks found in a cache")
    axes.set_title(scenario)
    axes.grid(visible=True, alpha=0.3)
    if report.oracles:
        axes.legend(fontsize=8)


def _pooled(report: Report) -> list[tuple[str, float]]:
    if not report.oracles:
        return []
    return [
        ("one pooled LRU cache", statistics.median(oracle.lru_share for oracle in report.oracles)),
        ("at best (Belady)", statistics.median(oracle.belady_share for oracle in report.oracles)),
    ]


def _colour(policy: str) -> str:
    return _OURS if policy == OURS else _ORACLE if policy == OMNISCIENT else _PEER
