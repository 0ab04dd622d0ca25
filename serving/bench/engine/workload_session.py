"""`python -m serving.bench engine --model-config ...`: one model under the workloads, beside computed floors.

The engine runs them first, in this process; then its memory is given back and each peer runs them in its
own. The report is written after every workload, so a run that is cut short keeps what it has.
"""

from __future__ import annotations

import gc
import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import torch
from rich.console import Console

from kernels import machine as cpu_machine
from kernels.bench.measure import measure_ceilings
from serving.bench.engine.capture_clock import CaptureClock
from serving.bench.engine.figures import percentile
from serving.bench.engine.offline import EngineSetup, EngineUnderTest, available_cores
from serving.bench.engine.peer_weights import bfloat16_folder
from serving.bench.engine.peers import Peer, PeerFailed, PeerSpec
from serving.bench.engine.workload_report import (
    DeviceFacts,
    MemoryFacts,
    PeerFigures,
    WorkloadReport,
    print_workloads,
    write,
)
from serving.bench.engine.workload_runs import measure_workload
from serving.bench.engine.workloads import Kind, Scale, Workload, workloads
from serving.engine.machine import Machine
from serving.errors import ConfigError

MODELS = Path(__file__).parent / "models"
_PEER_RUNS = 2  # the first finds kernels


@dataclass(frozen=True)
class WorkloadPlan:
    """What to measure. `setup`'s sizes of a step are replaced by the scale's."""

    setup: EngineSetup
    kinds: tuple[Kind, ...]
    scale: Scale
    repeats: int
    peers: tuple[PeerSpec, ...]
    command: str
    json_file: Path | None


def config_folder(name: str) -> Path:
    """The folder of a named config, or of a path to a config.json. Raises ConfigError."""
    path = Path(name).expanduser()
    if path.name == "config.json" and path.is_file():
        return path.parent
    folder = MODELS / name
    if (folder / "config.json").is_file():
        return folder
    names = ", ".join(sorted(entry.name for entry in MODELS.iterdir()))
    raise ConfigError(f"--model-config {name}: give the path of a config.json, or one of {names}")


def run(plan: WorkloadPlan, console: Console) -> WorkloadReport:
    """Measure `plan`, and print and write what was found.

    Raises ConfigError or ModelFileError; a peer that fails is a failure in the report.
    """
    device = measure_device(plan.setup)
    machine = Machine(device.flops_per_s, device.bytes_per_s)
    scale = plan.scale
    setup = replace(plan.setup, max_num_seqs=scale.max_num_seqs, max_step_tokens=scale.max_step_tokens)
    started_s = time.perf_counter()
    with EngineUnderTest(setup) as under_test:
        report = WorkloadReport(
            date=datetime.now(UTC).isoformat(timespec="seconds"),
            command=plan.command,
            model=under_test.files.name,
            dtype=under_test.dtype,
            device=device,
            max_num_seqs=scale.max_num_seqs,
            max_step_tokens=scale.max_step_tokens,
            load_s=time.perf_counter() - started_s,
            memory=_memory(under_test),
        )
        clock = CaptureClock(under_test.runner) if setup.device == "cuda" else None
        todo = list(workloads(under_test.spec, plan.kinds, scale))
        for workload in todo:
            with console.status(workload.name):
                figures = measure_workload(under_test, workload, machine, plan.repeats, scale.traced_steps)
            report = msgspec.structs.replace(
                report,
                workloads=(*report.workloads, figures),
                captures_s=tuple(clock.captures_s) if clock else (),
                memory=_memory(under_test),
            )
            write(report, plan.json_file)
            _say(console, f"{workload.name}: {figures.tokens_per_s:.1f} tokens/s")
        weights = _peers_folder(under_test) if plan.peers else Path()
    _give_back_memory()
    for spec in plan.peers:
        report = _add_peer(report, spec, plan, weights, todo, console)
    print_workloads(report, console)
    return report


def measure_device(setup: EngineSetup) -> DeviceFacts:
    """The ceilings of the device, by large reads and products."""
    if setup.device == "cuda":
        ceilings = measure_ceilings()
        _give_back_memory()
        return DeviceFacts(ceilings.device, ceilings.bytes_per_s, ceilings.flops_per_s["bf16"])
    torch.set_num_threads(setup.threads or available_cores())
    flops_per_s, bytes_per_s = cpu_machine.measure("bfloat16")
    return DeviceFacts(platform.processor() or platform.machine(), bytes_per_s, flops_per_s)


def _add_peer(
    report: WorkloadReport,
    spec: PeerSpec,
    plan: WorkloadPlan,
    weights: Path,
    todo: Sequence[Workload],
    console: Console,
) -> WorkloadReport:
    """`report` with what `spec` did of our greedy workloads, or why it did not."""
    greedy = [workload for workload in todo if workload.requests[0].temperature == 0]
    longest = max(sum(lengths) for workload in greedy for lengths in workload.lengths)
    threads = plan.setup.threads or available_cores()
    try:
        with closing(Peer(spec, weights, threads, report.max_num_seqs, longest, plan.setup.device)) as peer:
            for figures in _peer_figures(peer, greedy, report):
                report = msgspec.structs.replace(report, peers=(*report.peers, figures))
                write(report, plan.json_file)
                _say(console, f"{figures.workload}, {spec.name}: {figures.tokens_per_s:.1f} tokens/s")
    except PeerFailed as failure:
        report = msgspec.structs.replace(report, failures=(*report.failures, str(failure)))
        write(report, plan.json_file)
    return report


def _peer_figures(peer: Peer, todo: Sequence[Workload], report: WorkloadReport) -> Iterator[PeerFigures]:
    ours = {figures.name: figures for figures in report.workloads}
    for workload in todo:
        prompts = [list(request.token_ids) for request in workload.requests]
        runs = [peer.generate(prompts, [out for _, out in workload.lengths]) for _ in range(_PEER_RUNS)]
        best = min(runs, key=lambda run: run.elapsed_s)
        own = ours[workload.name]
        counted = workload.tokens_in if workload.kind == "prefill" else workload.tokens_out
        yield PeerFigures(
            peer=peer.name,
            description=peer.description,
            workload=workload.name,
            runs=len(runs),
            elapsed_s=best.elapsed_s,
            tokens_per_s=counted / best.elapsed_s,
            phase_floor_share=own.phase_floor_s / best.elapsed_s,
            ttft_p50_ms=1e3 * percentile([times[0] for times in best.token_times_s], 50),
            ours=best.elapsed_s / own.elapsed_s,
        )


def _peers_folder(under_test: EngineUnderTest) -> Path:
    """The same bits where there are any; else the config, of which a peer makes random weights of its own."""
    if under_test.setup.random_weights:
        return under_test.files.folder
    return bfloat16_folder(under_test.files, under_test.spec)


def _memory(under_test: EngineUnderTest) -> MemoryFacts:
    worker = under_test.worker
    kv_bytes = worker.num_blocks * worker.block_bytes
    pool = MemoryFacts(worker.num_blocks, under_test.setup.block_tokens, kv_bytes)
    if under_test.setup.device != "cuda":
        return pool
    free_bytes, total_bytes = torch.cuda.mem_get_info()
    return msgspec.structs.replace(
        pool,
        peak_allocated_bytes=torch.cuda.max_memory_allocated(),
        used_bytes=total_bytes - free_bytes,
        total_bytes=total_bytes,
    )


def _give_back_memory() -> None:
    """To the device, for whoever comes next: a peer has a process of its own."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _say(console: Console, line: str) -> None:
    console.print(f"{datetime.now(UTC):%H:%M:%S} {line}", highlight=False)
