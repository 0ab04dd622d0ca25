"""The comparison's report as tables."""

from __future__ import annotations

import math
import statistics

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from serving.bench.engine.tables import print_verdicts
from serving.bench.router.figures import RunFigures
from serving.bench.router.report import Report
from serving.bench.router.targets import verdicts

_NONE = "-"
_TIMES = ("hits", "/LRU", "max/mean", "TTFT s", "p99", "TPOT ms", "p99", "goodput")
_MEMORY = ("served", "refused", "preempted", "KV use", "CoV", "Jain", "crossed")


def print_report(report: Report, console: Console) -> None:
    """Figures a scenario, the pooled caches, the targets, and what to know about them."""
    for note in report.notes:
        console.print(f"[dim]{escape(note)}[/]", highlight=False)
    for scenario in report.scenarios:
        _print_scenario(report, scenario, console)
    _print_oracles(report, console)
    print_verdicts(verdicts(report), console)
    objective, num_seeds = report.objective, len({run.seed for run in report.runs})
    console.print(
        f"medians over {num_seeds} seeds; TTFT and TPOT p50 and p99; goodput: "
        f"TTFT at most {objective.ttft_s:g} s and TPOT at most {objective.tpot_ms:g} ms, of all requests; "
        "who is refused for good waits for ever; refused (by replicas, most are placed elsewhere) and "
        f"preempted: of 100 requests; {report.elapsed_s:.0f} s on {report.num_processes} processes",
        highlight=False,
    )


def _print_scenario(report: Report, scenario: str, console: Console) -> None:
    runs = [run for run in report.runs if run.scenario == scenario]
    console.print(f"\n[bold]{scenario}[/]: {runs[0].load:.0%} load", highlight=False)
    times, memory = _table("policy", *_TIMES), _table("policy", *_MEMORY)
    for policy in report.policies(scenario):
        sizes = sorted({run.num_replicas for run in report.of(scenario, policy)}, reverse=True)
        for size in sizes:
            name = policy if len(sizes) == 1 else f"{policy} x {size}"
            rows = report.of(scenario, policy, size)
            times.add_row(name, *_placement_cells(report, rows), *_time_cells(rows))
            memory.add_row(name, *_memory_cells(rows))
    console.print(times)
    console.print(memory)


def _placement_cells(report: Report, runs: list[RunFigures]) -> list[str]:
    of_lru = [
        run.hit_share / lru_share
        for run in runs
        if run.scenario == report.scenarios[0] and (lru_share := report.lru_share(run.seed))
    ]
    return [
        _median([run.hit_share for run in runs], ".3f"),
        _median(of_lru, ".2f"),
        _median([run.prefill_max_over_mean for run in runs], ".2f"),
    ]


def _time_cells(runs: list[RunFigures]) -> list[str]:
    return [
        _median([run.ttft_p50_s for run in runs], ".3f"),
        _median([run.ttft_p99_s for run in runs], ".2f"),
        _median([run.tpot_p50_ms for run in runs], ".0f"),
        _median([run.tpot_p99_ms for run in runs], ".0f"),
        _median([run.goodput for run in runs], ".1%"),
    ]


def _memory_cells(runs: list[RunFigures]) -> list[str]:
    return [
        _median([run.served_share for run in runs], ".1%"),
        _median([run.refusals_per_100 for run in runs], ".2f"),
        _median([run.preemptions_per_100 for run in runs], ".2f"),
        _median([run.kv_utilisation for run in runs], ".0%"),
        _median([run.kv_cov for run in runs], ".3f"),
        _median([run.jain for run in runs], ".3f"),
        _median([run.cross_region_share for run in runs], ".1%"),
    ]


def _table(*columns: str) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for index, name in enumerate(columns):
        table.add_column(name, justify="right" if index else "left", no_wrap=True)
    return table


def _print_oracles(report: Report, console: Console) -> None:
    if report.oracles:
        lru = statistics.median(oracle.lru_share for oracle in report.oracles)
        best = statistics.median(oracle.belady_share for oracle in report.oracles)
        console.print(
            f"\none cache of the whole fleet's blocks would hit {lru:.3f} of the prompts' blocks as LRU, "
            f"and at best (Belady) {best:.3f}\n",
            highlight=False,
        )


def _median(values: list[float] | list[float | None], layout: str) -> str:
    known = [value for value in values if value is not None and not math.isnan(value)]
    return format(statistics.median(known), layout) if known else _NONE
