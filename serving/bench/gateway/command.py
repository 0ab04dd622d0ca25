"""`python -m serving.bench gateway`: what a request costs between its client and its replica."""

from __future__ import annotations

import asyncio
import os
import shlex
import socket
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from serving.auth import load_key
from serving.bench.commands import check_folder, errors_told, progress_bar
from serving.bench.gateway.hop import WARM_UP_CALLS, Hop, deploy_echo, measure_hop
from serving.bench.gateway.report import Report, print_report, write_json
from serving.bench.gateway.throughput import Throughput, measure_throughput
from serving.bench.load.client import Target
from serving.bench.load.plan import parse_streams
from serving.up import HOST, UpOptions, brought_up

INTERRUPTED_EXIT = 130


def gateway(
    streams: Annotated[int, typer.Option(min=1, help="Clients, each with one request at a time.")] = 64,
    seconds: Annotated[float, typer.Option(min=1, help="Of the window that counts.")] = 20.0,
    warm_up: Annotated[float, typer.Option(min=0, help="Seconds before it.")] = 8.0,
    max_tokens: Annotated[int, typer.Option(min=1, help="An answer's length.")] = 4,
    replicas: Annotated[int, typer.Option(min=1, help="With mock engines.")] = 2,
    step_ms: Annotated[float, typer.Option(min=0, help="Of the mock engine's steps.")] = 10.0,
    at_once: Annotated[str, typer.Option(help="Picks at once, beside as many bare calls.")] = "1,32",
    calls: Annotated[int, typer.Option(min=1, help="Picks and bare calls of each of them.")] = 1000,
    json_file: Annotated[
        Path | None, typer.Option("--json", dir_okay=False, help="Write every figure there.")
    ] = None,
) -> None:
    """Requests a CPU-second of Ingress and Router, and the Router's hop beside a bare call of Serve.

    Starts a cluster with mock engines here, sends requests through its public endpoint, and takes it
    down again. Clients share the machine's cores, and are not counted.
    """
    console = Console(width=None if sys.stdout.isatty() else 140)
    options = UpOptions(
        mock_engine=True,
        mock_step_ms=step_ms,
        replicas_per_region=replicas,
        port=_free_port(),
        dashboard_port=_free_port(),
    )
    key = load_key()
    try:
        with errors_told():
            check_folder("--json", json_file)
            concurrencies = parse_streams(at_once)
            with brought_up(options, key, console) as facts:
                target = Target(facts.endpoint, key, facts.model)
                throughput = _throughput(target, streams, max_tokens, warm_up, seconds, console)
                deploy_echo()
                hops = asyncio.run(_hops(facts.model, concurrencies, calls, console))
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED_EXIT) from None
    report = Report(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        command=f"python -m serving.bench {shlex.join(sys.argv[1:])}",
        cores=len(os.sched_getaffinity(0)),
        throughput=throughput,
        hops=hops,
    )
    print_report(report, console)
    if json_file is not None:
        write_json(report, json_file)


def _throughput(
    target: Target, streams: int, max_tokens: int, warm_up_s: float, window_s: float, console: Console
) -> Throughput:
    with console.status("") as status:

        def progress(elapsed_s: float, answered: int) -> None:
            of_s = warm_up_s + window_s
            status.update(f"{streams} streams: {elapsed_s:.0f} of {of_s:.0f} s, {answered} answered")

        measured = measure_throughput(target, streams, max_tokens, warm_up_s, window_s, progress)
        return asyncio.run(measured)


async def _hops(model: str, concurrencies: Sequence[int], calls: int, console: Console) -> tuple[Hop, ...]:
    hops = []
    with progress_bar(console) as bar:
        for number in concurrencies:
            task = bar.add_task(f"picks and bare calls, {number} at once", total=calls + WARM_UP_CALLS)
            hops.append(await measure_hop(model, number, calls, partial(bar.update, task)))
    return tuple(hops)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port
