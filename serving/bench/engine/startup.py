"""How long a fresh process takes to its first token: from safetensors that the page cache holds.

A config's random weights are saved once, as bfloat16 safetensors in several files; a model's own are read
where they are. Processes are measured one after the other: the first with an empty cache of compiled
kernels, the others with what it left there.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import torch
from rich.console import Console
from safetensors.torch import save_file

from serving.bench.engine.offline import EngineSetup
from serving.bench.engine.peer_weights import tensor_shapes
from serving.bench.engine.workload_report import write
from serving.errors import SearoomError
from serving.model_files import resolve
from serving.model_spec import read_model_spec
from serving.models.random_weights import RandomSource

_SHARD_BYTES = 4 << 30
_READ_BYTES = 64 << 20
_LIMIT_S = 300


@dataclass(frozen=True)
class StartupPlan:
    """`folder` receives a config's weights; it is left alone where `setup` has weights of its own."""

    setup: EngineSetup
    folder: Path
    repeats: int
    command: str
    json_file: Path | None


class Start(msgspec.Struct, frozen=True):
    """Seconds of each stage of one process, by its name."""

    kernels: str
    first_token_s: float
    stages_s: dict[str, float]


class StartupReport(msgspec.Struct, frozen=True):
    """Starts in their order. `weights_bytes` is what each reads."""

    date: str
    command: str
    model: str
    device: str
    weights_bytes: int
    starts: tuple[Start, ...] = ()


def run(plan: StartupPlan, console: Console) -> StartupReport:
    """Measure, print and write. Raises ModelFileError or SearoomError where a process fails."""
    setup = plan.setup
    if setup.random_weights:
        with console.status(f"saving weights in {plan.folder}"):
            save_random(Path(setup.source), plan.folder, setup.device)
        setup = replace(setup, source=str(plan.folder), random_weights=False)
    files = resolve(setup.source)
    report = StartupReport(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        command=plan.command,
        model=files.name,
        device=torch.cuda.get_device_name() if setup.device == "cuda" else "cpu",
        weights_bytes=sum(path.stat().st_size for path in files.weights),
    )
    torch.cuda.empty_cache()
    with tempfile.TemporaryDirectory() as kernels:
        for number in range(1 + plan.repeats):
            for path in files.weights:
                _read(path)
            start = _start(setup, Path(kernels), "compiled now" if number == 0 else "compiled before")
            report = msgspec.structs.replace(report, starts=(*report.starts, start))
            write(report, plan.json_file)
            told = ", ".join(f"{stage} {seconds:.2f}" for stage, seconds in start.stages_s.items())
            console.print(
                f"first token {start.first_token_s:.2f} s after the process's start, kernels "
                f"{start.kernels}: {told}",
                highlight=False,
            )
    return report


def save_random(config: Path, folder: Path, device: str) -> None:
    """A folder that is served as a model's: `config`'s random weights, config and an empty tokenizer.

    It is left as it is where it is complete: its index is written last.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    spec = read_model_spec(config)
    source = RandomSource(0, torch.bfloat16, torch.device(device))
    shards = list(_shards(tensor_shapes(spec)))
    weight_map: dict[str, str] = {}
    for number, shapes in enumerate(shards, start=1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {tensor: source.tensor(tensor, shape).cpu() for tensor, shape in shapes.items()}
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shapes, name)
    (folder / "config.json").write_text((config / "config.json").read_text())
    (folder / "tokenizer.json").write_text("{}")
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _shards(shapes: dict[str, tuple[int, ...]]) -> Iterator[dict[str, tuple[int, ...]]]:
    """Tensors in their order, cut into files of at most `_SHARD_BYTES` where one tensor is no larger."""
    shard: dict[str, tuple[int, ...]] = {}
    held = 0
    for name, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        if shard and held + size > _SHARD_BYTES:
            yield shard
            shard, held = {}, 0
        shard[name] = shape
        held += size
    yield shard


def _start(setup: EngineSetup, kernels: Path, what: str) -> Start:
    command = [sys.executable, "-m", "serving.bench.engine.first_token"]
    environment = os.environ | {"TRITON_CACHE_DIR": str(kernels)}
    arguments = [repr(time.time()), json.dumps(asdict(setup))]
    ran = subprocess.run(
        [*command, *arguments], env=environment, capture_output=True, text=True, timeout=_LIMIT_S, check=False
    )
    if ran.returncode:
        words = ran.stderr.strip().splitlines()
        raise SearoomError(f"a start ended with status {ran.returncode}: {words[-1] if words else 'no word'}")
    stages: dict[str, float] = json.loads(ran.stdout.splitlines()[-1])
    after_s = stages["after the first token"]
    return Start(what, sum(stages.values()) - after_s, stages)


def _read(path: Path) -> None:
    """Into the page cache."""
    with path.open("rb", buffering=0) as content:
        while content.read(_READ_BYTES):
            pass
