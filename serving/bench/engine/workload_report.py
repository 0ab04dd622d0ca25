"""A GPU run's report: its JSON, written again after every workload, and its tables."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import msgspec
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from serving.bench.engine.workload_figures import WorkloadFigures

_NONE = "-"


class DeviceFacts(msgspec.Struct, frozen=True):
    """What shares are of, as it was measured in the same run."""

    name: str
    bytes_per_s: float
    flops_per_s: float


class MemoryFacts(msgspec.Struct, frozen=True):
    """Of the device, in bytes. `used_bytes` is all that is not free; a CPU knows the pool alone."""

    kv_blocks: int
    block_tokens: int
    kv_bytes: int
    peak_allocated_bytes: int | None = None
    used_bytes: int | None = None
    total_bytes: int | None = None


class PeerFigures(msgspec.Struct, frozen=True, kw_only=True):
    """A peer at one of our workloads, of its best of `runs`. `ours` is our tokens/s over the peer's."""

    peer: str
    description: str
    workload: str
    runs: int
    elapsed_s: float
    tokens_per_s: float
    phase_floor_share: float
    ttft_p50_ms: float
    ours: float


class WorkloadReport(msgspec.Struct, frozen=True, kw_only=True):
    """Everything a run has found so far."""

    date: str
    command: str
    model: str
    dtype: str
    device: DeviceFacts
    max_num_seqs: int
    max_step_tokens: int
    load_s: float
    memory: MemoryFacts
    captures_s: tuple[float, ...] = ()
    workloads: tuple[WorkloadFigures, ...] = ()
    peers: tuple[PeerFigures, ...] = ()
    failures: tuple[str, ...] = ()


def write(report: msgspec.Struct, path: Path | None) -> None:
    """As JSON; nowhere without a path."""
    if path is not None:
        path.write_bytes(msgspec.json.format(msgspec.json.encode(report)) + b"\n")


def print_workloads(report: WorkloadReport, console: Console) -> None:
    """A row a workload, then what the engine took to get there."""
    device, memory = report.device, report.memory
    console.print(
        f"{report.model} ({report.dtype}) on {device.name}; measured in this run: "
        f"{device.bytes_per_s / 1e9:.0f} GB/s, {device.flops_per_s / 1e12:.1f} TFLOP/s",
        highlight=False,
    )
    console.print(_table(report.workloads))
    console.print(
        f"loaded in {report.load_s:.1f} s; {memory.kv_blocks} KV blocks of {memory.block_tokens} tokens, "
        f"{_gib(memory.kv_bytes)}; {_memory(memory)}{len(report.captures_s)} graphs captured in "
        f"{sum(report.captures_s):.2f} s",
        highlight=False,
    )
    for peer in report.peers:
        console.print(
            f"{peer.workload}: {peer.peer} {peer.tokens_per_s:.1f} tokens/s, {peer.phase_floor_share:.1%} of "
            f"floor; ours {peer.ours:.2f} times that ({escape(peer.description)})",
            highlight=False,
        )
    for failure in report.failures:
        console.print(f"[bold red]error:[/] {escape(failure)}", highlight=False)


def _table(workloads: Iterable[WorkloadFigures]) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    columns = (
        "workload", "tokens/s", "of phases", "step ms", "of steps", "of GB/s", "TFLOP/s", "TTFT ms",
        "sched. ms", "idle traced", "untraced", "first run s",
    )  # fmt: skip
    for index, name in enumerate(columns):
        table.add_column(name, justify="right" if index else "left")
    for one in workloads:
        table.add_row(
            one.name,
            f"{one.tokens_per_s:.1f}",
            f"{one.phase_floor_share:.1%}",
            f"{one.step_ms:.3f}",
            f"{one.step_floor_share:.1%}",
            f"{one.bandwidth_share:.1%}",
            f"{one.tflops:.1f}",
            f"{one.ttft_p50_ms:.0f}",
            f"{one.schedule_p50_ms:.3f}",
            _share(one.traced_idle_share),
            _share(one.untraced_idle_share),
            f"{one.first_run_s:.1f}",
        )
    return table


def _memory(memory: MemoryFacts) -> str:
    if memory.peak_allocated_bytes is None or memory.used_bytes is None or memory.total_bytes is None:
        return ""
    return (
        f"peak {_gib(memory.peak_allocated_bytes)} allocated, {_gib(memory.used_bytes)} of "
        f"{_gib(memory.total_bytes)} used; "
    )


def _share(value: float | None) -> str:
    return _NONE if value is None else f"{value:.1%}"


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"
