"""`python -m serving.bench load`: an endpoint as its clients see it."""

from __future__ import annotations

import asyncio
import ipaddress
import resource
import shlex
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

import typer
from rich.console import Console

from serving import running
from serving.auth import load_key
from serving.bench.commands import check_folder, errors_told, plotter
from serving.bench.load.client import Target, first_model
from serving.bench.load.figures import Slo, figures
from serving.bench.load.plan import Kind, Plan, parse_endpoint, parse_streams
from serving.bench.load.progress import Progress
from serving.bench.load.report import (
    Report,
    RunReport,
    print_closed,
    print_failures,
    print_run,
    request_rows,
    write_json,
)
from serving.bench.load.run import Run
from serving.bench.router.workload import Workload
from serving.errors import ConfigError

DEFAULT_STREAMS = "1,32"
INTERRUPTED_EXIT = 130


def load(
    endpoint: Annotated[str | None, typer.Option(help="Default: what `searoom up` runs here.")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="SEAROOM_API_KEY")] = None,
    model: Annotated[str | None, typer.Option(help="Default: the first the endpoint lists.")] = None,
    streams: Annotated[
        str | None, typer.Option(help="Closed loop: concurrent streams, one run each. Default: 1,32.")
    ] = None,
    rate: Annotated[float | None, typer.Option(min=1e-6, help="Open loop: requests/s, Poisson.")] = None,
    trace: Annotated[
        Path | None, typer.Option(help="Open loop: a Mooncake .jsonl or an Azure .csv, at its times.")
    ] = None,
    speed: Annotated[float | None, typer.Option(min=1e-6, help="The trace, so many times as fast.")] = None,
    raw_times: Annotated[
        bool, typer.Option("--raw-times", help="The trace's times as they are, rounded ones too.")
    ] = False,
    workload: Annotated[
        Kind, typer.Option(help="generated: sessions of turns behind shared system prompts.")
    ] = "stories",
    think_s: Annotated[
        float | None, typer.Option(min=0, help="Mean pause before a next turn. Default: 5; closed loop: 0.")
    ] = None,
    requests: Annotated[int | None, typer.Option(min=1, help="Stop after so many were sent.")] = None,
    duration: Annotated[float | None, typer.Option(min=0.001, help="Send for so many seconds.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Most new tokens a request. Default: 64, or the workload's.")
    ] = None,
    max_prompt_tokens: Annotated[
        int | None, typer.Option(min=1, help="Cut the trace's longer prompts to about so many.")
    ] = None,
    ignore_eos: Annotated[
        bool, typer.Option(help="Every answer as long as asked; not every server knows this field.")
    ] = True,
    seed: Annotated[int, typer.Option(min=0, help="Of texts and times; a new one finds no warm cache.")] = 0,
    retry: Annotated[int, typer.Option(min=0, help="Retries of a refusal, after its Retry-After.")] = 0,
    timeout_s: Annotated[float, typer.Option("--timeout", min=0.1, help="Seconds a request may take.")] = 600,
    slo_ttft_ms: Annotated[float | None, typer.Option(min=0, help="Good requests have this TTFT.")] = None,
    slo_tpot_ms: Annotated[float | None, typer.Option(min=0, help="And this time a token.")] = None,
    detail: Annotated[
        bool, typer.Option("--detail", help="All percentiles of a closed loop too, and who answered.")
    ] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", dir_okay=False, help="Write every figure and request there.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(dir_okay=False, help="Write a PNG there; needs Searoom's extra `bench`.")
    ] = None,
) -> None:
    """Tokens/s, TTFT and time per token of any OpenAI-compatible endpoint, in a closed or an open loop.

    In an open loop times count from when a request was due, so a slow server cannot hide its queue.
    Ctrl-C ends a run and prints what there is.
    """
    console = Console(width=None if sys.stdout.isatty() else 140)
    is_closed = streams is not None or (rate is None and trace is None)
    slo = None if slo_ttft_ms is None and slo_tpot_ms is None else Slo(slo_ttft_ms, slo_tpot_ms)
    with errors_told():
        write_plot = None if plot is None else plotter("serving.bench.load.plot")
        check_folder("--json", json_file)
        check_folder("--plot", plot)
        plan = Plan(
            workload=workload,
            trace=trace,
            streams=parse_streams(streams or DEFAULT_STREAMS) if is_closed else (),
            rate=rate,
            speed=speed,
            raw_times=raw_times,
            requests=requests,
            duration_s=duration,
            think_s=think_s,
            max_tokens=max_tokens,
            max_prompt_tokens=max_prompt_tokens,
            seed=seed,
        )
        plan.check()
        recorded = plan.read()
        base = parse_endpoint(endpoint) if endpoint is not None else running.require().endpoint
        key = api_key or _own_key(base)
        target = Target(base, key, model or "", ignore_eos, retry, timeout_s)
        _allow_many_connections()
        target, runs = asyncio.run(_measure(plan, target, recorded))
    report = Report(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        command=f"python -m serving.bench {shlex.join(_without_key(sys.argv[1:]))}",
        endpoint=base,
        model=target.model,
        workload=plan.name,
        seed=seed,
        slo=slo,
        notes=plan.notes(recorded),
        runs=tuple(_run_report(plan, number, run, slo) for number, run in enumerate(runs)),
    )
    _print(report, console, is_closed, detail)
    with errors_told():
        if json_file is not None:
            _written(json_file, lambda path: write_json(report, path))
        if plot is not None and write_plot is not None:
            _written(plot, lambda path: write_plot(report, path))
    _exit(report, is_closed)


async def _measure(plan: Plan, target: Target, recorded: Workload | None) -> tuple[Target, list[Run]]:
    """The runs, of which the last may have been interrupted, and the target with its model's name."""
    if not target.model:
        target = replace(target, model=await first_model(target.endpoint, target.api_key))
    runs: list[Run] = []
    for number, num_streams in enumerate(plan.streams or (None,)):
        run = Run(target, plan.limits(num_streams))
        runs.append(run)
        label = "open loop" if num_streams is None else f"{num_streams} streams"
        display = asyncio.create_task(Progress(run, label).show(Console(stderr=True)))
        sessions = plan.sessions(recorded, number)
        try:
            if num_streams is None:
                await run.open_loop(sessions)
            else:
                await run.closed_loop(sessions, num_streams)
        finally:
            display.cancel()
            with suppress(asyncio.CancelledError):
                await display
        if run.is_interrupted:
            break
    return target, runs


def _run_report(plan: Plan, number: int, run: Run, slo: Slo | None) -> RunReport:
    return RunReport(
        streams=plan.streams[number] if plan.streams else None,
        rate=plan.rate,
        figures=figures(run.records, run.elapsed_s, slo),
        cpu_s=run.cpu_s,
        is_interrupted=run.is_interrupted,
        requests=request_rows(run.records),
    )


def _print(report: Report, console: Console, is_closed: bool, detail: bool) -> None:
    if is_closed:
        print_closed(report.runs, console)
    for run in report.runs:
        if detail or not is_closed:
            print_run(run, report.slo, console)
        print_failures(run, console)
        if run.is_interrupted:
            console.print(f"[yellow]interrupted:[/] {run.label} is not whole", highlight=False)
    for note in report.notes:
        console.print(f"note: {note}", highlight=False, markup=False)


def _exit(report: Report, is_closed: bool) -> None:
    """With an error where a closed loop has holes, or where nothing was answered at all."""
    if any(run.is_interrupted for run in report.runs):
        raise typer.Exit(INTERRUPTED_EXIT)
    found = [run.figures for run in report.runs]
    if not any(part.num_ok for part in found) or (is_closed and any(part.failures for part in found)):
        raise typer.Exit(1)


def _own_key(endpoint: str) -> str | None:
    """The key of `searoom up` here, for an endpoint on this machine; it is nobody else's business."""
    host = urlsplit(endpoint).hostname or ""
    try:
        is_here = ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_here = host == "localhost"
    return load_key() if is_here else None


def _without_key(arguments: list[str]) -> list[str]:
    """The command line, fit to be kept."""
    shown = list(arguments)
    for at, argument in enumerate(arguments):
        if argument == "--api-key" and at + 1 < len(shown):
            shown[at + 1] = "..."
        elif argument.startswith("--api-key="):
            shown[at] = "--api-key=..."
    return shown


def _allow_many_connections() -> None:
    """As many open files as this user may have: a connection a request in flight."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _written(path: Path, write: Callable[[Path], None]) -> None:
    try:
        write(path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from error
