"""`python -m serving.bench router`: the production policy in a simulated fleet, beside its peers'."""

from __future__ import annotations

import os
import shlex
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from serving.bench.commands import check_folder, errors_told, plotter, progress_bar
from serving.bench.router.calibrate import calibrate
from serving.bench.router.decisions import measure_decisions
from serving.bench.router.figures import Objective
from serving.bench.router.large_fleet import REQUESTS_A_REPLICA, run_large_fleet
from serving.bench.router.plan import ComparisonPlan, default_policies, run_all
from serving.bench.router.policies import OMNISCIENT, OURS, named
from serving.bench.router.report import Report, write_json
from serving.bench.router.runs import Scenario, Source, workload_of
from serving.bench.router.tables import print_report
from serving.errors import ConfigError

GENERATED = "generated"
REQUESTS = 2000


def router(
    trace: Annotated[
        Path | None, typer.Option(help="A Mooncake .jsonl or an Azure .csv file of requests.")
    ] = None,
    workload: Annotated[str, typer.Option(help=f'Without a trace: "{GENERATED}".')] = GENERATED,
    raw_times: Annotated[
        bool, typer.Option("--raw-times", help="Mooncake's timestamps as they are, in ticks of 3 s.")
    ] = False,
    compare: Annotated[
        bool, typer.Option("--compare", help="Every policy, every scenario and the targets.")
    ] = False,
    policies: Annotated[
        str | None,
        typer.Option(help='A list, or "all". Default: ours and the omniscient one; compared: all.'),
    ] = None,
    load: Annotated[
        float, typer.Option(min=0.01, help="Of the fleet's capacity by the step-time model.")
    ] = 0.85,
    replicas: Annotated[int, typer.Option(min=1, help="In all regions together.")] = 8,
    regions: Annotated[int, typer.Option(min=1, max=3, help="With phase-shifted days, if several.")] = 1,
    routers: Annotated[int, typer.Option(min=1, help="In each region.")] = 1,
    stale_ms: Annotated[float, typer.Option(min=0, help="Extra age of all that routers hear.")] = 0.0,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each, of which the median counts.")] = 5,
    requests: Annotated[
        int | None,
        typer.Option(
            min=0,
            help=f"A run; of a trace, each seed has its own window. 0: the whole trace. Default: {REQUESTS}, "
            f"or {REQUESTS_A_REPLICA} a replica of a --fleet.",
        ),
    ] = None,
    ttft_s: Annotated[float, typer.Option(min=0, help="Goodput's limit.")] = Objective().ttft_s,
    tpot_ms: Annotated[float, typer.Option(min=0, help="Goodput's limit.")] = Objective().tpot_ms,
    processes: Annotated[int, typer.Option(min=0, help="0: one a core.")] = 0,
    with_calibration: Annotated[
        bool, typer.Option("--calibrate", help="Instead: the simulator beside the real engine.")
    ] = False,
    decisions: Annotated[
        bool, typer.Option("--decisions", help="Instead: how long one decision takes.")
    ] = False,
    fleet: Annotated[
        int | None,
        typer.Option(min=1, help="Instead: our policy among so many replicas, once; and its cost."),
    ] = None,
    seconds: Annotated[float, typer.Option(min=1.0, help="In which a --fleet's requests arrive.")] = 60.0,
    json_file: Annotated[
        Path | None, typer.Option("--json", dir_okay=False, help="Write every figure there.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(dir_okay=False, help="Write a PNG there; needs Searoom's extra `bench`.")
    ] = None,
) -> None:
    """Routing policies in simulated fleets: hits, TTFT, goodput, balance, preemptions, fairness.

    Replicas are Qwen3-32B on two H100 by the roofline; each has the engine's own scheduler and blocks.
    """
    console = Console()
    objective = Objective(ttft_s, tpot_ms)
    with errors_told():
        check_folder("--json", json_file)
        check_folder("--plot", plot)
        if with_calibration:
            calibrate(console, json_file)
            return
        if decisions:
            measure_decisions(console)
            return
        if fleet is not None:
            run_large_fleet(fleet, seconds, requests, objective, console, json_file)
            return
        if trace is None and workload != GENERATED:
            raise ConfigError(f'--workload {workload}: "{GENERATED}" is the only one; or give a --trace')
        write_plot = None if plot is None else plotter("serving.bench.router.plot")
        plan = ComparisonPlan(
            source=Source(
                trace, raw_times, _num_requests(REQUESTS if requests is None else requests, trace), seeds
            ),
            scenario=Scenario(
                name=f"{routers} router{'s' * (routers > 1)}, {stale_ms:g} ms stale",
                load=load,
                num_replicas=replicas,
                num_regions=regions,
                num_routers=routers,
                staleness_ms=stale_ms,
            ),
            policies=_policies(policies, compare),
            num_seeds=seeds,
            objective=objective,
            whole=compare,
        )
        report = _run(plan, processes or os.cpu_count() or 1, console)
    print_report(report, console)
    if json_file is not None:
        write_json(report, json_file)
    if plot is not None and write_plot is not None:
        write_plot(report, plot)


def _run(plan: ComparisonPlan, num_processes: int, console: Console) -> Report:
    """Everything the plan asks for, with a progress bar."""
    start_s = time.monotonic()
    jobs = plan.jobs()
    # Made here first, so that a broken trace is told before any process is started.
    example = workload_of(plan.source, plan.scenarios()[0][0], 0)
    num_processes = max(1, min(num_processes, len(jobs)))
    with progress_bar(console) as progress:
        task = progress.add_task("simulating", total=len(jobs) + plan.num_seeds)
        runs, oracles = run_all(plan, num_processes, lambda: progress.advance(task))
    return Report(
        date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        command=f"python -m serving.bench {shlex.join(sys.argv[1:])}",
        workload=plan.source.name,
        objective=plan.objective,
        num_processes=num_processes,
        elapsed_s=time.monotonic() - start_s,
        runs=tuple(runs),
        oracles=tuple(oracles),
        notes=(f"{plan.source.name}, seed 0: {'; '.join(example.notes)}",),
    )


def _policies(names: str | None, compare: bool) -> tuple[str, ...]:
    if names == "all" or (names is None and compare):
        return default_policies()
    return (OURS, OMNISCIENT) if names is None else named(names)


def _num_requests(requests: int, trace: Path | None) -> int:
    if requests == 0 and trace is None:
        raise ConfigError("--requests 0 is a whole trace; say how many to generate, like 2000")
    return requests
