"""A calibration's report: its JSON and its table."""

from __future__ import annotations

from pathlib import Path

import msgspec
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cluster.load import StepCoefficients
from serving.bench.engine.report import Verdict
from serving.bench.router.calibration_figures import RunTimes, ratio


class ReplicaSteps(msgspec.Struct, frozen=True, kw_only=True):
    """A replica's steps: as they were learned, and how the run's own compare with that."""

    name: str
    step: StepCoefficients
    num_rehearsed: int
    pause_ms: float
    median_error: float
    p95_error: float
    num_run: int
    run_over_rehearsed: float
    """Milliseconds of the run's steps over what was foretold of them: a machine's change meanwhile."""


class Calibration(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that was found."""

    date: str
    command: str
    num_requests: int
    span_s: float
    notes: tuple[str, ...]
    replica_rtt_ms: float
    router_hop_ms: float
    replicas: tuple[ReplicaSteps, ...]
    failures: tuple[str, ...]
    real: RunTimes
    simulated: RunTimes
    evenly_paced: RunTimes
    verdicts: tuple[Verdict, ...]


def write_json(found: Calibration, path: Path) -> None:
    path.write_bytes(msgspec.json.format(msgspec.json.encode(found)) + b"\n")


def print_calibration(found: Calibration, console: Console) -> None:
    """The figures, and what is to be known of them."""
    for note in found.notes:
        console.print(f"[dim]{escape(note)}[/]", highlight=False)
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("figure")
    for column in ("real", "simulated", "ratio", "target", "", "evenly paced"):
        table.add_column(column, justify="right", no_wrap=True)
    verdicts = {verdict.what: verdict for verdict in found.verdicts}
    for name in RunTimes.__struct_fields__:
        cells = [format(float(getattr(run, name)), ".4g") for run in (found.real, found.simulated)]
        verdict = verdicts.get(name)
        word = "" if verdict is None else "[green]pass[/]" if verdict.holds else "[red]FAIL[/]"
        table.add_row(
            name.replace("_", " "),
            *cells,
            format(ratio(found.real, found.simulated, name), ".3f"),
            verdict.needed if verdict else "",
            word,
            format(float(getattr(found.evenly_paced, name)), ".4g"),
        )
    console.print(table)
    for steps in found.replicas:
        console.print(
            f"{steps.name}: {steps.num_rehearsed} steps rehearsed, errors {steps.median_error:.1%} "
            f"(median) and {steps.p95_error:.0%} (p95), pause {steps.pause_ms:.2f} ms; in the run "
            f"{steps.num_run} steps took {steps.run_over_rehearsed:.3f} times what was foretold",
            highlight=False,
        )
    console.print(
        f"{found.num_requests} requests in {found.span_s:.0f} s; to the Router and back "
        f"{found.router_hop_ms:.2f} ms, to a replica and back {found.replica_rtt_ms:.2f} ms",
        highlight=False,
    )
    for failure in found.failures:
        console.print(f"[red]failed:[/] {escape(failure)}", highlight=False)
