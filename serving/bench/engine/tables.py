"""The comparison's report as tables."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from serving.bench.engine.figures import Point
from serving.bench.engine.report import Report, Verdict, verdicts

_NONE = "-"
_PASS, _FAIL = "[green]pass[/]", "[bold red]FAIL[/]"


def print_report(report: Report, console: Console) -> None:
    """Figures, targets, and what went wrong."""
    machine = report.machine
    rates = ", ".join(f"{rate / 1e9:.0f} GFLOP/s {dtype}" for dtype, rate in machine.flops_per_s.items())
    console.print(
        f"{report.model} on {machine.cpu}, {machine.threads} threads; measured in this run: "
        f"{machine.bytes_per_s / 1e9:.1f} GB/s, {rates}",
        highlight=False,
    )
    for row in report.rows:
        console.print(f"  [bold]{row.name}[/]: {row.description}", highlight=False)
    _print_rates(report, console)
    _print_ratios(report, console)
    _print_shares(report, console)
    print_verdicts(verdicts(report), console)
    for note in report.notes:
        console.print(f"[yellow]note:[/] {escape(note)}", highlight=False)
    for failure in report.failures:
        console.print(f"[bold red]error:[/] {escape(failure)}", highlight=False)


def print_verdicts(found: Sequence[Verdict], console: Console) -> None:
    """A line a target; nothing where there is none."""
    if not found:
        return
    table = _table("target", "needed", "measured", "")
    for verdict in found:
        word = _NONE if verdict.holds is None else _PASS if verdict.holds else _FAIL
        table.add_row(escape(verdict.what), verdict.needed, _number(verdict.measured, ".3f"), word)
    console.print(table)


def _print_rates(report: Report, console: Console) -> None:
    columns = ("load", "engine", "tokens/s", "of runs", "TTFT p50", "TPOT p50", "p99 ms")
    table = _table(*columns, first_text=2)
    for point in report.points:
        table.add_row(
            _label(point),
            point.row,
            f"{point.tokens_per_s:.1f}",
            f"{point.slowest_tokens_per_s:.0f}-{point.fastest_tokens_per_s:.0f}",
            f"{point.ttft_p50_ms:.0f}",
            _number(point.tpot_p50_ms, ".1f"),
            _number(point.tpot_p99_ms, ".1f"),
        )
    console.print(table)


def _print_ratios(report: Report, console: Console) -> None:
    """Our tokens/s over each peer's, and how often all drew the same first token."""
    peers = {row.peer: row.name for row in report.rows if row.peer is not None}
    if not peers:
        return
    table = _table("load", "engine", *(f"x {peer}" for peer in peers), first_text=2)
    ours = {row.name for row in report.rows if row.peer is None}
    for point in (p for p in report.points if p.row in ours):
        table.add_row(
            _label(point), point.row, *(_number(report.ratio(point, peer), ".2f") for peer in peers)
        )
    console.print(table)
    first = report.rows[0].name
    words = [f"{name} {share:.0%}" for name, share in _agreements(report).items()]
    console.print(f"first tokens equal to {first}'s: {', '.join(words)}", highlight=False)


def _agreements(report: Report) -> dict[str, float]:
    """By row, over the sequences of all loads."""
    found = {}
    for row in report.rows:
        points = [p for p in report.points if p.row == row.name and p.first_token_agreement is not None]
        if points:
            equal = sum((p.first_token_agreement or 0.0) * p.load.batch for p in points)
            found[row.name] = equal / sum(p.load.batch for p in points)
    return found


def _print_shares(report: Report, console: Console) -> None:
    """Of a step: what is not the forward, and shares of what was measured; the linear layers' tokens/s."""
    columns = ("load", "engine", "overhead", "of GB/s", "FLOP/s", "floor", "linear", "of it")
    table = _table(*columns, first_text=2)
    for point in (p for p in report.points if p.overhead_share is not None):
        table.add_row(*_share_cells(point))
    if table.row_count:
        console.print(table)


def _share_cells(point: Point) -> list[str]:
    return [
        _label(point),
        point.row,
        _number(point.overhead_share, ".1%"),
        _number(point.bandwidth_share, ".0%"),
        _number(point.compute_share, ".0%"),
        _number(point.floor_share, ".0%"),
        _number(point.linear_bound_tokens_per_s, ".0f"),
        _number(point.linear_bound_share, ".0%"),
    ]


def _label(point: Point) -> str:
    load = point.load
    return f"prefill {load.prompt_tokens}" if load.kind == "prefill" else f"batch {load.batch}"


def _table(*columns: str, first_text: int = 1) -> Table:
    """Left-aligned in the first columns, right-aligned figures in the rest."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for index, name in enumerate(columns):
        table.add_column(
            name, justify="left" if index < first_text else "right", no_wrap=first_text > 1 or index > 0
        )
    return table


def _number(value: float | None, layout: str) -> str:
    return _NONE if value is None else format(value, layout)
