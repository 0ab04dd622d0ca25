"""One comparison from its options to its report: loads every engine, lets them take turns, sums up."""

from __future__ import annotations

import platform
import statistics
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from kernels.machine import measure_bytes_per_s, measure_flops_per_s
from serving.bench.engine.comparison import (
    IDLE_CORE_SHARE,
    Engine,
    OurEngine,
    PeerEngine,
    Prompts,
    Results,
    compare,
)
from serving.bench.engine.figures import Load, Point, summarise
from serving.bench.engine.linear_bound import products_of, step_s
from serving.bench.engine.offline import EngineSetup, EngineUnderTest, available_cores, resolved_dtype
from serving.bench.engine.peer_weights import bfloat16_folder
from serving.bench.engine.peers import Peer, PeerFailed, PeerSpec
from serving.bench.engine.prompts import Windows
from serving.bench.engine.report import MachineFacts, Report, Row
from serving.engine.machine import Machine
from serving.engine.native_runner import NativeRunner
from serving.tokenizer import Tokenizer


@dataclass(frozen=True)
class Plan:
    """What to compare. `setup.dtype` is replaced by each of `dtypes` in turn."""

    setup: EngineSetup
    dtypes: tuple[str, ...]
    peers: tuple[PeerSpec, ...]
    loads: tuple[Load, ...]
    repeats: int
    command: str

    @property
    def max_batch(self) -> int:
        return max(load.batch for load in self.loads)

    @property
    def max_tokens(self) -> int:
        """Prompt and new tokens of the longest sequence."""
        return max(load.prompt_tokens + load.new_tokens for load in self.loads)

    @property
    def threads(self) -> int:
        return self.setup.threads or available_cores()


def run(plan: Plan, console: Console) -> Report:
    """Measure `plan`. Raises ConfigError or ModelFileError; a peer that fails is a failure in the report."""
    with ExitStack() as stack:
        session = _Session(plan, console, stack)
        return session.report(session.measure())


class _Session:
    """The loaded engines of one comparison; `stack` ends them."""

    def __init__(self, plan: Plan, console: Console, stack: ExitStack) -> None:
        self._plan = plan
        self._console = console
        self._rows: list[Row] = []
        self._engines: list[Engine] = []
        self._ours: list[EngineUnderTest] = []
        self._failures: list[str] = []
        torch.set_num_threads(plan.threads)
        with console.status("") as status:
            for dtype in dict.fromkeys(map(resolved_dtype, plan.dtypes)):
                status.update(f"loading searoom in {dtype}")
                self._add_ours(replace(plan.setup, dtype=dtype), stack)
            if self._weights(self._first) == "as stored" and any(p.name != "llama.cpp" for p in plan.peers):
                status.update("loading searoom with the peers' bfloat16 weights")
                folder = bfloat16_folder(self._first.files, self._first.spec)
                self._add_ours(replace(plan.setup, source=str(folder), dtype="bfloat16"), stack)
            for spec in plan.peers:
                status.update(f"starting {spec.name} (vLLM compiles for minutes)")
                try:
                    self._add_peer(spec, stack)
                except PeerFailed as failure:
                    self._failures.append(str(failure))
            status.update("measuring the machine")
            self._facts = MachineFacts(
                cpu=_cpu_name(),
                threads=plan.threads,
                bytes_per_s=measure_bytes_per_s(),
                flops_per_s={ours.dtype: measure_flops_per_s(ours.dtype) for ours in self._ours},
            )
            status.update("packing linear layers for their bound")
            self._products = {
                row.name: products_of(ours) for row, ours in zip(self._rows, self._ours, strict=False)
            }
        self._bound_step_s: dict[tuple[str, Load], list[float]] = defaultdict(list)
        self._windows = Windows(Tokenizer(self._first.files))

    def measure(self) -> Results:
        plan = self._plan
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        # Drawn between runs only: a thread that redraws would compete with what is measured.
        with Progress(*columns, console=self._console, auto_refresh=False) as progress:
            task = progress.add_task("", total=len(plan.loads) * (plan.repeats + 1) * len(self._engines))

            def on_run(load: Load, name: str) -> None:
                progress.update(task, advance=1, description=f"{load.kind}, batch {load.batch}: {name}")
                progress.refresh()

            return compare(
                self._engines, plan.loads, self._prompts, plan.repeats, beside=self._bound, on_run=on_run
            )

    def report(self, results: Results) -> Report:
        plan = self._plan
        notes = [
            f"{name} used {share:.0%} of a core while another engine ran"
            for name, share in results.idle_shares.items()
            if share > IDLE_CORE_SHARE
        ]
        points = [
            self._point(row, load, results)
            for load in plan.loads
            for row in self._rows
            if results.samples[row.name, load]
        ]
        return Report(
            date=datetime.now(UTC).isoformat(timespec="seconds"),
            command=plan.command,
            model=self._first.files.name,
            machine=self._facts,
            repeats=plan.repeats,
            rows=tuple(self._rows),
            points=tuple(points),
            failures=(*self._failures, *results.failures.values()),
            notes=tuple(notes),
        )

    @property
    def _first(self) -> EngineUnderTest:
        return self._ours[0]

    def _add_ours(self, setup: EngineSetup, stack: ExitStack) -> None:
        setup = replace(setup, max_num_seqs=max(setup.max_num_seqs, self._plan.max_batch))
        under_test = stack.enter_context(EngineUnderTest(setup))
        self._ours.append(under_test)
        weights = self._weights(under_test)
        path = "native kernels" if isinstance(under_test.runner, NativeRunner) else "torch's kernels"
        row = Row(
            f"searoom {setup.dtype}" + (" equal bits" if weights == "bfloat16" else ""),
            f"this engine, weights {weights}, products in {setup.dtype}, {path}, torch {torch.__version__}",
            weights,
            setup.dtype,
        )
        self._rows.append(row)
        self._engines.append(OurEngine(row.name, under_test))

    @staticmethod
    def _weights(under_test: EngineUnderTest) -> Literal["bfloat16", "as stored"]:
        return "as stored" if under_test.files.weights[0].suffix == ".gguf" else "bfloat16"

    def _add_peer(self, spec: PeerSpec, stack: ExitStack) -> None:
        files = self._first.files
        if spec.name == "llama.cpp":
            model = files.weights[0]
            if model.suffix != ".gguf":
                raise PeerFailed(
                    "llama.cpp reads GGUF files only: pass --model FILE.gguf, or leave this peer out"
                )
        else:
            model = bfloat16_folder(files, self._first.spec)
        peer = Peer(spec, model, self._plan.threads, self._plan.max_batch, self._plan.max_tokens)
        stack.callback(peer.close)
        if spec.name == "llama.cpp":
            row = Row(spec.name, peer.description, "as stored", "int8", spec.name)
        else:
            row = Row(spec.name, peer.description, "bfloat16", "bfloat16", spec.name)
        self._rows.append(row)
        self._engines.append(PeerEngine(spec.name, peer))

    def _prompts(self, load: Load) -> Prompts:
        return [self._windows.take(load.prompt_tokens) for _ in range(load.batch)]

    def _bound(self, load: Load) -> None:
        if load.kind == "decode":
            for row, products in self._products.items():
                self._bound_step_s[row, load].append(step_s(products, load.batch))

    def _point(self, row: Row, load: Load, results: Results) -> Point:
        samples = results.samples[row.name, load]
        first = self._rows[0].name
        reference = results.samples[first, load] if row.name != first else []
        if row.peer is not None:
            return summarise(row.name, load, samples, reference=reference)
        bounds = self._bound_step_s.get((row.name, load))
        return summarise(
            row.name,
            load,
            samples,
            machine=Machine(self._facts.flops_per_s[row.dtype], self._facts.bytes_per_s),
            linear_step_s=statistics.median(bounds) if bounds else None,
            reference=reference,
        )


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
