"""`python -m serving.bench collectives`: the sums that tensor parallelism waits for."""

from __future__ import annotations

import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import torch
import typer
from rich.console import Console
from rich.table import Table

from serving.bench.collectives.measure import AllReduce, measure
from serving.bench.commands import check_folder, errors_told
from serving.errors import ConfigError

_MIB = 1 << 20


class CollectivesReport(msgspec.Struct, frozen=True, kw_only=True):
    """All sums of one machine. `backend` and `version` name the library."""

    date: str
    command: str
    device: str
    backend: str
    version: str
    nominal_gb_per_s: float | None
    results: tuple[AllReduce, ...] = ()


def collectives(
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="NCCL on GPUs, gloo on CPUs.")] = "cuda",
    ranks: Annotated[
        str | None, typer.Option(help="Group sizes. Default: 1, 2, 4, ... as many as there are GPUs.")
    ] = None,
    largest_mib: Annotated[int, typer.Option(min=1, help="Sizes go from 1 KiB to this.")] = 256,
    nominal: Annotated[
        float | None, typer.Option(min=0.1, help="GB/s a direction of a rank's links; NVLink 4: 450.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", dir_okay=False, help="Write every figure there.")
    ] = None,
) -> None:
    """All-reduces of bfloat16 from the host and from a CUDA graph: latency, and bus bandwidth."""
    console = Console()
    report = CollectivesReport(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        command=f"python -m serving.bench {shlex.join(sys.argv[1:])}",
        device=torch.cuda.get_device_name() if device == "cuda" and torch.cuda.is_available() else "cpu",
        backend="nccl" if device == "cuda" else "gloo",
        version=".".join(map(str, torch.cuda.nccl.version())) if device == "cuda" else str(torch.__version__),
        nominal_gb_per_s=nominal,
    )
    with errors_told():
        check_folder("--json", json_file)
        for size in _group_sizes(ranks, device):
            nominal_bytes_per_s = None if nominal is None else nominal * 1e9
            for found in measure(size, device, largest_mib * _MIB, nominal_bytes_per_s):
                report = msgspec.structs.replace(report, results=(*report.results, found))
                if json_file is not None:
                    json_file.write_bytes(msgspec.json.format(msgspec.json.encode(report)) + b"\n")
    console.print(_table(report))


def _group_sizes(ranks: str | None, device: str) -> list[int]:
    gpus = torch.cuda.device_count() if device == "cuda" else 0
    if device == "cuda" and not gpus:
        raise ConfigError("--device cuda: there is no CUDA GPU here; --device cpu rehearses with gloo")
    if ranks is None:
        return [size for size in (1, 2, 4, 8, 16) if size <= max(gpus, 2 if device == "cpu" else 1)]
    parts = [part.strip() for part in ranks.split(",")]
    if not all(part.isdigit() and int(part) for part in parts):
        raise ConfigError(f"--ranks {ranks}: give numbers above 0 with commas between, like 1,2")
    if device == "cuda" and max(map(int, parts)) > gpus:
        raise ConfigError(f"--ranks {ranks}: there are {gpus} GPUs here")
    return [int(part) for part in parts]


def _table(report: CollectivesReport) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("ranks", "way", "KiB", "µs", "GB/s of bus", "of nominal"):
        table.add_column(name, justify="left" if name == "way" else "right")
    for one in report.results:
        table.add_row(
            str(one.ranks),
            one.way,
            str(one.bytes // 1024),
            f"{one.us:.1f}",
            f"{one.bus_bytes_per_s / 1e9:.2f}" if one.crosses_links else "no link is crossed",
            "-" if one.nominal_share is None else f"{one.nominal_share:.1%}",
        )
    return table
