"""A comparison's report: its JSON, and the medians that tables and targets read."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path

import msgspec

from serving.bench.router.figures import Objective, RunFigures
from serving.bench.router.runs import OracleHits

Figure = Callable[[RunFigures], float | None]


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that was found. Infinite times (too many refusals) are null in the JSON."""

    date: str
    command: str
    workload: str
    objective: Objective
    num_processes: int
    elapsed_s: float
    runs: tuple[RunFigures, ...]
    oracles: tuple[OracleHits, ...]
    notes: tuple[str, ...] = ()

    @property
    def scenarios(self) -> list[str]:
        """In the order they were run."""
        return list(dict.fromkeys(run.scenario for run in self.runs))

    def policies(self, scenario: str) -> list[str]:
        return list(dict.fromkeys(run.policy for run in self.runs if run.scenario == scenario))

    def of(self, scenario: str, policy: str, num_replicas: int | None = None) -> list[RunFigures]:
        """By seed."""
        found = [
            run
            for run in self.runs
            if run.scenario == scenario and run.policy == policy and num_replicas in (None, run.num_replicas)
        ]
        return sorted(found, key=lambda run: run.seed)

    def median(self, scenario: str, policy: str, figure: Figure) -> float | None:
        """Over the seeds; None where it was not run, or has no such figure."""
        values = [value for run in self.of(scenario, policy) if (value := figure(run)) is not None]
        return statistics.median(values) if values else None

    def lru_share(self, seed: int) -> float | None:
        return next((oracle.lru_share for oracle in self.oracles if oracle.seed == seed), None)


def write_json(report: Report, path: Path) -> None:
    path.write_bytes(msgspec.json.format(msgspec.json.encode(report)) + b"\n")
