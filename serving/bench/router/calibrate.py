"""The simulator beside the real engine, on this machine.

    rehearse ──learned steps──► requests at a load ──► play, in real time ──► times ─┐
                  └───────────────────────────────────► simulate ──────────► times ─┴─► verdicts

Each of two replicas is a process on a core of its own; Ingress, Router and this program share the two.
"""

from __future__ import annotations

import asyncio
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from serving.bench.router.calibration_engine import Learned
from serving.bench.router.calibration_figures import (
    RunTimes,
    StepFit,
    fit_of,
    foretold_ms,
    measured_ms,
    median_of,
    real_times,
    simulated_times,
    verdicts_of,
)
from serving.bench.router.calibration_fleet import PipedReplicas, started
from serving.bench.router.calibration_load import PLAN, poisson, real_requests, scaled_to
from serving.bench.router.calibration_play import Served, play, rehearse
from serving.bench.router.calibration_replica import REGION, ReplicaOptions
from serving.bench.router.calibration_report import Calibration, ReplicaSteps, print_calibration, write_json
from serving.bench.router.generated import GeneratorPlan
from serving.bench.router.policies import searoom
from serving.bench.router.workload import Workload
from serving.errors import ConfigError
from serving.load_reporter import BUSY_INTERVAL_S
from serving.simulator import SimReplica, SimRequest, SimSetup, simulate

LOAD = 0.7  # of the fleet's capacity by the learned steps
REHEARSAL_S = 60.0
WIDTHS = (4, 1, 12, 2, 16, 6, 3, 8)
NUM_SIMULATIONS = 9
"""With the rehearsal's pace from different moments on; the median of each figure counts."""

Say = Callable[[str], None]
Progressed = Callable[[int, int], None]


@dataclass(frozen=True)
class CalibrationPlan:
    replicas: tuple[ReplicaOptions, ...]
    workload: GeneratorPlan = PLAN
    load: float = LOAD
    rehearsal_s: float = REHEARSAL_S
    widths: tuple[int, ...] = WIDTHS
    num_simulations: int = NUM_SIMULATIONS
    seed: int = 0


def calibrate(console: Console, json_file: Path | None) -> None:
    """Compare simulated times with the real engine's on this machine; about four minutes.

    Raises ConfigError where it cannot.
    """
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise ConfigError("--calibrate: needs two cores, one for each replica's engine")
    plan = CalibrationPlan(
        tuple(ReplicaOptions(name=f"replica-{number}", core=core) for number, core in enumerate(cores[:2]))
    )
    with _shown(console) as (say, progressed):
        found = asyncio.run(measure(plan, started(plan.replicas), say, progressed))
    print_calibration(found, console)
    if json_file is not None:
        write_json(found, json_file)


async def measure(
    plan: CalibrationPlan,
    fleet: AbstractAsyncContextManager[PipedReplicas],
    say: Say,
    progressed: Progressed,
) -> Calibration:
    """Rehearse, play, simulate."""
    say("loading the models")
    async with fleet as replicas:
        played = await _played(plan, replicas, say, progressed)
    setup, fits, requests = played.setup, played.fits, played.workload.requests
    busy_s = [float(measured_ms(played.run[name].steps, fits[name].pause_ms).sum()) / 1e3 for name in fits]
    real = real_times(requests, played.served, busy_s)
    say("simulating")
    simulated = [_simulated(_paced(setup, fits, seed), requests) for seed in range(plan.num_simulations)]
    median = median_of(simulated)
    return Calibration(
        date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        command=f"python -m serving.bench {shlex.join(sys.argv[1:])}",
        num_requests=len(requests),
        span_s=played.workload.span_s,
        notes=played.workload.notes,
        replica_rtt_ms=setup.rtt_s(REGION, REGION) * 1e3,
        router_hop_ms=setup.router_hop_ms,
        replicas=tuple(_steps(name, fits[name], played.run[name]) for name in fits),
        failures=tuple(sorted({one.failure for one in played.served if one.failure is not None})),
        real=real,
        simulated=median,
        evenly_paced=_simulated(setup, requests),
        verdicts=verdicts_of(real, median),
    )


@dataclass(frozen=True)
class _Played:
    """A real run, and what a simulation of it has to know."""

    setup: SimSetup
    fits: dict[str, StepFit]
    workload: Workload
    served: list[Served]
    run: dict[str, Learned]  # the engines' steps in it


async def _played(
    plan: CalibrationPlan, replicas: PipedReplicas, say: Say, progressed: Progressed
) -> _Played:
    """Learn the steps of both replicas under load, then serve requests at the load that follows from them."""
    block_tokens = plan.replicas[0].block_tokens
    facts = next(iter(replicas.facts.values()))
    say(f"learning steps of both, {plan.rehearsal_s:.0f} s")
    await replicas.renew()
    other = poisson(plan.workload, block_tokens, plan.seed + 1)
    rtt_s = await rehearse(
        replicas, real_requests(other.requests, facts, block_tokens), plan.rehearsal_s, plan.widths
    )
    fits = {name: fit_of(learned) for name, learned in (await replicas.renew()).items()}
    setup = _setup(plan, fits, facts.context_tokens, rtt_ms=rtt_s * 1e3)
    workload = scaled_to(poisson(plan.workload, block_tokens, plan.seed), setup, plan.load)
    requests = real_requests(workload.requests, facts, block_tokens)
    say(f"real requests, {workload.span_s:.0f} s")
    served = await play(replicas, searoom(0, setup), requests, lambda ended: progressed(ended, len(requests)))
    run = await replicas.renew()
    await replicas.rest()
    setup = replace(setup, router_hop_ms=_hop_s(served) * 1e3)
    return _Played(setup, fits, workload, served, run)


def _hop_s(served: Sequence[Served]) -> float:
    """From an arrival to its Route, of those that got one at once."""
    hops_s = [
        one.picked_s - one.arrival_s
        for one in served
        if one.failure is None and not one.was_queued and not one.refusals
    ]
    return float(np.median(hops_s)) if hops_s else 0.0


def _setup(
    plan: CalibrationPlan, fits: dict[str, StepFit], context_tokens: int, *, rtt_ms: float
) -> SimSetup:
    """The real fleet, simulated."""
    return SimSetup(
        replicas=tuple(
            SimReplica(
                name=options.name,
                region=REGION,
                num_blocks=options.num_blocks,
                step=fits[options.name].step,
                max_step_tokens=options.max_step_tokens,
                max_num_seqs=options.max_num_seqs,
                max_context_tokens=context_tokens,
            )
            for options in plan.replicas
        ),
        block_tokens=plan.replicas[0].block_tokens,
        rtt_ms={(REGION, REGION): rtt_ms},
        seed=plan.seed,
        decode_report_s=BUSY_INTERVAL_S,
    )


def _paced(setup: SimSetup, fits: dict[str, StepFit], seed: int) -> SimSetup:
    """As fast as in the rehearsal, begun elsewhere in it with each seed, at the same moment for all."""
    shortest_s = min(sum(taken_s for taken_s, _ in fit.pace) for fit in fits.values())
    offset_s = float(np.random.default_rng(seed).uniform(0.0, shortest_s))
    replicas = tuple(replace(spec, pace=fits[spec.name].begun_at(offset_s)) for spec in setup.replicas)
    return replace(setup, replicas=replicas)


def _simulated(setup: SimSetup, requests: Sequence[SimRequest]) -> RunTimes:
    return simulated_times(requests, simulate(setup, requests, searoom))


def _steps(name: str, fit: StepFit, run: Learned) -> ReplicaSteps:
    measured, foretold = measured_ms(run.steps, fit.pause_ms), foretold_ms(run.steps, fit.step)
    return ReplicaSteps(
        name=name,
        step=fit.step,
        num_rehearsed=len(fit.pace),
        pause_ms=fit.pause_ms,
        median_error=fit.median_error,
        p95_error=fit.p95_error,
        num_run=len(run.steps),
        run_over_rehearsed=float(measured.sum() / foretold.sum()),
    )


@contextmanager
def _shown(console: Console) -> Iterator[tuple[Say, Progressed]]:
    """Drawn once a second at most, by whoever calls: a thread that redraws would disturb what is measured."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, auto_refresh=False, transient=True) as progress:
        task = progress.add_task("", total=None)
        drawn_s = 0.0

        def say(what: str) -> None:
            progress.update(task, description=what)
            progress.refresh()

        def progressed(done: int, total: int) -> None:
            nonlocal drawn_s
            if time.monotonic() - drawn_s >= 1.0:
                drawn_s = time.monotonic()
                progress.update(task, completed=done, total=total)
                progress.refresh()

        yield say, progressed
