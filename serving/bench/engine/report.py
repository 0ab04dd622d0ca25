"""The comparison's report: its JSON, and the targets it is held against."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

import msgspec

from serving.bench.engine.figures import Kind, Load, Point
from serving.errors import ConfigError


class Row(msgspec.Struct, frozen=True):
    """An engine that was measured. `peer` is its name on the command line, None for Searoom's own.

    `weights` says in which bits they lie, `dtype` in which products are computed.
    """

    name: str
    description: str
    weights: Literal["bfloat16", "as stored"]
    dtype: str
    peer: str | None = None


class MachineFacts(msgspec.Struct, frozen=True):
    """What the machine was measured to do in the same run; FLOP/s by dtype."""

    cpu: str
    threads: int
    bytes_per_s: float
    flops_per_s: dict[str, float]


class Report(msgspec.Struct, frozen=True):
    """Everything a run found. `failures` name the rows that could not be measured, and why."""

    date: str
    command: str
    model: str
    machine: MachineFacts
    repeats: int
    rows: tuple[Row, ...]
    points: tuple[Point, ...]
    failures: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def point(self, row: str, load: Load) -> Point | None:
        return next((p for p in self.points if p.row == row and p.load == load), None)

    @property
    def loads(self) -> list[Load]:
        """In the order they were measured."""
        return list(dict.fromkeys(point.load for point in self.points))

    def ratio(self, point: Point, peer: str) -> float | None:
        """Tokens/s of `point` over the peer's at the same load; None where the peer was not measured."""
        row = next((row for row in self.rows if row.peer == peer), None)
        other = None if row is None else self.point(row.name, point.load)
        return None if other is None else point.tokens_per_s / other.tokens_per_s


class Target(msgspec.Struct, frozen=True):
    """Searoom must have so many times the peer's tokens/s: on equal bits, or in its best format."""

    kind: Kind
    batches: tuple[int, ...]
    format: Literal["equal bits", "best"]
    peer: str
    ratio: float


TARGETS = (
    Target("decode", (1,), "equal bits", "vllm", 1.2),
    Target("decode", (1,), "best", "llama.cpp", 1.0),
    Target("decode", (8, 16), "equal bits", "vllm", 1.3),
    Target("decode", (8, 16), "best", "vllm", 1.6),
    Target("decode", (32, 64), "equal bits", "vllm", 1.8),
    Target("decode", (32, 64), "best", "vllm", 2.0),
    Target("prefill", (1,), "equal bits", "vllm", 1.5),
    Target("prefill", (1,), "best", "vllm", 1.5),
)
MAX_OVERHEAD_SHARE, OVERHEAD_BATCH = 0.10, 64
MIN_LINEAR_BOUND_SHARE, LINEAR_BOUND_BATCHES = 0.75, (16, 32, 64)


class Verdict(msgspec.Struct, frozen=True):
    """One target at one load. `measured` None: the run lacks the row, the peer or the load."""

    what: str
    needed: str
    measured: float | None
    holds: bool | None


def verdicts(report: Report) -> list[Verdict]:
    """Every target at every load of the run that it speaks of."""
    found = [
        _ratio_verdict(report, target, load)
        for target in TARGETS
        for load in report.loads
        if load.kind == target.kind and load.batch in target.batches
    ]
    for point in _ours(report):
        load = point.load
        if load.kind == "decode" and load.batch == OVERHEAD_BATCH and point.overhead_share is not None:
            share = point.overhead_share
            found.append(
                Verdict(
                    f"{point.row}, batch {load.batch}: all but the forward, of a step",
                    f"<= {MAX_OVERHEAD_SHARE:.2f}",
                    share,
                    share <= MAX_OVERHEAD_SHARE,
                )
            )
        if load.batch in LINEAR_BOUND_BATCHES and point.row == _equal_bits(report):
            share_of_bound = point.linear_bound_share
            found.append(
                Verdict(
                    f"{point.row}, batch {load.batch}: share of its linear layers' bound",
                    f">= {MIN_LINEAR_BOUND_SHARE:.2f}",
                    share_of_bound,
                    None if share_of_bound is None else share_of_bound >= MIN_LINEAR_BOUND_SHARE,
                )
            )
    return found


def write_json(report: Report, path: Path) -> None:
    path.write_bytes(msgspec.json.format(msgspec.json.encode(report)) + b"\n")


def read_json(path: Path) -> Report:
    """The report in `path`. Raises ConfigError when it is none."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Report)
    except (OSError, msgspec.DecodeError) as broken:
        raise ConfigError(f"{path}: not a report of this benchmark: {broken}") from broken


def _ours(report: Report) -> list[Point]:
    names = {row.name for row in report.rows if row.peer is None}
    return [point for point in report.points if point.row in names]


def _equal_bits(report: Report) -> str | None:
    """Our row whose weights and products are the bfloat16 peers'."""
    return next(
        (
            row.name
            for row in report.rows
            if row.peer is None and row.weights == "bfloat16" and row.dtype == "bfloat16"
        ),
        None,
    )


def _ratio_verdict(report: Report, target: Target, load: Load) -> Verdict:
    ours = [point for point in _ours(report) if point.load == load]
    if target.format == "equal bits":
        ours = [point for point in ours if point.row == _equal_bits(report)]
    ratio = max((report.ratio(point, target.peer) or -math.inf for point in ours), default=-math.inf)
    measured = ratio if math.isfinite(ratio) else None
    where = f"prefill {load.prompt_tokens}" if load.kind == "prefill" else f"batch {load.batch}"
    form = "best format" if target.format == "best" else target.format
    return Verdict(
        f"{where}, {form}, tokens/s over {target.peer}",
        f">= {target.ratio:.1f}",
        measured,
        None if measured is None else measured >= target.ratio,
    )
