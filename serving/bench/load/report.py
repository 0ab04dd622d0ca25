"""What a load found, as JSON and as tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import msgspec
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from serving.bench.load.figures import Figures, Percentiles, Slo
from serving.bench.load.record import Record, State

LATE_MS = 20.0
"""Lateness (p99) from which the generator's own share of the latencies is pointed out."""


class RequestRow(msgspec.Struct, frozen=True):
    """One request. Seconds count from the run's start; None is what never came."""

    session: int
    turn: int
    state: State
    kind: str
    due_s: float
    lateness_ms: float | None
    ttft_ms: float | None
    tpot_ms: float | None
    e2e_ms: float | None
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    refusals: int
    region: str
    replica: str


class RunReport(msgspec.Struct, frozen=True):
    """One run; `streams` in a closed loop, `rate` in an open one that a trace's times do not drive."""

    streams: int | None
    rate: float | None
    figures: Figures
    cpu_s: float  # this program's
    is_interrupted: bool
    requests: tuple[RequestRow, ...]

    @property
    def label(self) -> str:
        if self.streams is not None:
            return f"{self.streams} streams"
        return "the trace's times" if self.rate is None else f"{self.rate:g} requests/s"


class Report(msgspec.Struct, frozen=True):
    date: str
    command: str
    endpoint: str
    model: str
    workload: str
    seed: int
    slo: Slo | None
    notes: tuple[str, ...]
    runs: tuple[RunReport, ...]


def request_rows(records: Sequence[Record]) -> tuple[RequestRow, ...]:
    return tuple(
        RequestRow(
            session=record.session,
            turn=record.turn,
            state=record.state,
            kind=record.kind,
            due_s=record.due_s,
            lateness_ms=_known(record.lateness_ms),
            ttft_ms=_known(record.ttft_ms),
            tpot_ms=_known(record.tpot_ms),
            e2e_ms=_known(record.e2e_ms),
            prompt_tokens=record.prompt_tokens,
            cached_tokens=record.cached_tokens,
            output_tokens=record.output_tokens,
            refusals=record.refusals,
            region=record.region,
            replica=record.replica,
        )
        for record in records
    )


def write_json(report: Report, path: Path) -> None:
    path.write_bytes(msgspec.json.format(msgspec.json.encode(report)) + b"\n")


def print_closed(runs: Sequence[RunReport], console: Console) -> None:
    """A row a concurrency."""
    names = ["streams", "tokens/s", "TTFT p50 ms", "TTFT p99 ms", "TPOT p50 ms", "TPOT p99 ms"]
    with_slo = any(run.figures.goodput for run in runs)
    table = _table(*names, *(["goodput %", "goodput/s"] if with_slo else []))
    for run in runs:
        found = run.figures
        cells = [f"{found.tokens_per_s:.1f}"]
        for part in (found.ttft_ms, found.tpot_ms):
            cells += ["-", "-"] if part is None else [f"{part.p50:.1f}", f"{part.p99:.1f}"]
        if found.goodput is not None:
            cells += [f"{100 * found.goodput.share:.1f}", f"{found.goodput.per_s:.2f}"]
        table.add_row(str(run.streams), *cells)
    console.print(table)


def print_run(run: RunReport, slo: Slo | None, console: Console) -> None:
    """Everything of one run but its single requests."""
    found = run.figures
    line = (
        f"{run.label}: {found.num_sent} sent in {found.elapsed_s:.1f} s, {found.num_ok} answered, "
        f"{found.num_refused} refused, {found.num_failed} failed"
    )
    cut_off = f", {found.num_unfinished} cut off" if found.num_unfinished else ""
    console.print(line + cut_off, highlight=False)
    rates = f"{found.requests_per_s:.2f} requests/s, {found.tokens_per_s:.1f} tokens/s"
    if found.num_ok:
        rates += (
            f"; a request: {found.prompt_tokens / found.num_ok:.0f} prompt tokens, "
            f"{found.output_tokens / found.num_ok:.0f} new"
        )
    if found.cached_tokens:
        rates += f"; {100 * found.cached_tokens / found.prompt_tokens:.1f} % of prompt tokens were cached"
    console.print(rates, highlight=False)
    _print_percentiles(found, console)
    if found.goodput is not None and slo is not None:
        good = found.goodput
        console.print(
            f"goodput ({_words(slo)}): {100 * good.share:.1f} % of requests, {good.per_s:.2f}/s",
            highlight=False,
        )
    _print_served(found, console)
    _print_generator(run, console)


def print_failures(run: RunReport, console: Console) -> None:
    """Requests without an answer, by kind."""
    found = run.figures
    for failed in found.failures:
        what = f"{failed.num_requests} {'refused' if failed.is_refusal else 'failed'}"
        words = f"{escape(failed.kind)}[/]: {escape(failed.example)}"
        console.print(f"[red]{run.label}: {what}: {words}", highlight=False)
    if found.num_refusals > found.num_refused:
        console.print(f"{run.label}: {found.num_refusals} refusals in all, retries included", highlight=False)


def _print_percentiles(found: Figures, console: Console) -> None:
    table = _table("ms", "p50", "p90", "p99", "max")
    rows: tuple[tuple[str, Percentiles | None], ...] = (
        ("TTFT", found.ttft_ms),
        ("TPOT", found.tpot_ms),
        ("inter-token", found.inter_token_ms),
        ("E2E", found.e2e_ms),
        ("sent late", found.lateness_ms),
    )
    for name, part in rows:
        if part is not None:
            table.add_row(name, *(f"{value:.1f}" for value in (part.p50, part.p90, part.p99, part.max)))
    console.print(table)


def _print_served(found: Figures, console: Console) -> None:
    if not found.served:
        return
    table = _table("region", "replica", "requests", left=2)
    for place in found.served:
        table.add_row(place.region, place.replica, str(place.num_requests))
    console.print(table)


def _print_generator(run: RunReport, console: Console) -> None:
    found = run.figures
    line = f"this program: {100 * run.cpu_s / found.elapsed_s:.0f} % of a core"
    if found.output_tokens:
        line += f", {1e6 * run.cpu_s / found.output_tokens:.0f} µs a token"
    console.print(line, highlight=False)
    late = found.lateness_ms
    if late is not None and late.p99 > LATE_MS:
        console.print(
            f"[yellow]note:[/] 1 % of requests were sent more than {late.p99:.0f} ms late, which is in "
            "their times: this program lacked CPU",
            highlight=False,
        )


def _words(slo: Slo) -> str:
    limits = (("TTFT", slo.ttft_ms), ("TPOT", slo.tpot_ms))
    return ", ".join(f"{name} ≤ {limit:g} ms" for name, limit in limits if limit is not None)


def _table(*columns: str, left: int = 1) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for number, name in enumerate(columns):
        is_word = number < left and name != "streams"
        table.add_column(name, justify="left" if is_word else "right", no_wrap=True)
    return table


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value
