"""How well the step-time model predicts steps of the real engine, beside what can be predicted at all.

A mixed load of changing width warms the model up, then the same kind of load is predicted step by step,
each before it is run. Of those steps some are kept and run again and again, by turns: what identical
steps differ from their own median by is noise that no model of sizes could foretell.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from serving.bench.engine.offline import BenchRequest, EngineSetup, EngineUnderTest
from serving.engine.executor import Launched
from serving.engine.plan import SamplingBatch, StepPlan
from serving.messages import StepStats

WARM_UP_STEPS = 200
MEASURED_STEPS = 400
WANTED_MEDIAN, WANTED_P95 = 0.05, 0.15
NOISE_FACTOR = 1.3  # or so many times the repeat noise
_KEPT_PLANS = 24
_REPEATS = 9
_WIDTHS = (1, 2, 4, 8, 16, 32, 48, 64)
_WAVE_SEED = 3


@dataclass(frozen=True)
class Errors:
    """Relative errors: |predicted / measured - 1|, or |measured / median - 1|."""

    median: float
    p95: float

    @classmethod
    def of(cls, errors: NDArray[np.floating]) -> Errors:
        return cls(float(np.median(errors)), float(np.quantile(errors, 0.95)))

    def __str__(self) -> str:
        return f"median {self.median:6.1%}, p95 {self.p95:6.1%}"


@dataclass(frozen=True)
class StepAccuracy:
    num_steps: int
    predicted: Errors
    repeat_noise: Errors

    @property
    def passes(self) -> bool:
        """Within the targets, or within 1.3 times the noise where that is more."""
        return self.predicted.median <= max(
            WANTED_MEDIAN, NOISE_FACTOR * self.repeat_noise.median
        ) and self.predicted.p95 <= max(WANTED_P95, NOISE_FACTOR * self.repeat_noise.p95)


def run(setup: EngineSetup, console: Console) -> StepAccuracy:
    """Measure and print; a minute or two."""
    with EngineUnderTest(setup) as under_test, console.status("steps of many shapes") as status:
        rng = np.random.default_rng(_WAVE_SEED)
        steps: list[StepStats] = []
        recorder = _Recorder(under_test, WARM_UP_STEPS)
        while len(steps) < WARM_UP_STEPS + MEASURED_STEPS:
            steps += under_test.run(_wave(under_test, rng)).steps
            status.update(f"{len(steps)} of {WARM_UP_STEPS + MEASURED_STEPS} steps")
        recorder.detach()
        measured = steps[WARM_UP_STEPS:]
        errors = np.array([abs(step.predicted_ms / step.step_ms - 1) for step in measured])
        status.update("identical steps")
        noise = _repeat_noise(under_test, recorder.kept, rng)
    result = StepAccuracy(len(measured), Errors.of(errors), noise)
    verdict = "[green]PASS[/]" if result.passes else "[red]FAIL[/]"
    lines = (
        f"{result.num_steps} steps after {WARM_UP_STEPS} to warm up, batches of 1 to 64",
        f"  prediction error   {result.predicted}   (wanted: 5 % and 15 %, or 1.3 times the noise)",
        f"  repeat noise       {result.repeat_noise}   (identical steps, from their own median)",
        verdict,
    )
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)
    return result


def _wave(under_test: EngineUnderTest, rng: np.random.Generator) -> list[BenchRequest]:
    """Requests that come together: as many as one width, short and long."""
    width = int(rng.choice([w for w in _WIDTHS if w <= under_test.setup.max_num_seqs]))
    longest = min(1200, under_test.num_blocks * under_test.setup.block_tokens // (2 * width) - 80)
    return [
        BenchRequest(
            token_ids=tuple(rng.integers(0, under_test.spec.vocab_size, length).tolist()),
            max_tokens=int(rng.integers(8, 72)),
        )
        for length in np.minimum(rng.geometric(1 / 160, width) + 8, max(16, longest)).tolist()
    ]


@dataclass
class _Recorder:
    """Keeps every so many plans that an engine's executor runs after the warm-up."""

    under_test: EngineUnderTest
    skip: int
    kept: list[tuple[StepPlan, SamplingBatch]] = field(default_factory=list)
    _num_steps: int = 0

    def __post_init__(self) -> None:
        executor = self.under_test.engine._executor
        self._launch = executor.launch
        self._executor = executor
        executor.launch = self._record  # type: ignore[method-assign]

    def detach(self) -> None:
        self._executor.launch = self._launch  # type: ignore[method-assign]

    def _record(self, plan: StepPlan, sampling: SamplingBatch) -> Launched:
        self._num_steps += 1
        due = self._num_steps > self.skip and self._num_steps % (MEASURED_STEPS // _KEPT_PLANS) == 0
        if due and len(self.kept) < _KEPT_PLANS:
            self.kept.append((plan, sampling))
        return self._launch(plan, sampling)


def _repeat_noise(
    under_test: EngineUnderTest, kept: list[tuple[StepPlan, SamplingBatch]], rng: np.random.Generator
) -> Errors:
    """Every kept step several times, in an order drawn anew each round; the first round is not counted."""
    executor = under_test.engine._executor
    times: dict[int, list[float]] = {index: [] for index in range(len(kept))}
    for _ in range(_REPEATS + 1):
        for index in rng.permutation(len(kept)).tolist():
            started_s = time.perf_counter()
            executor.launch(*kept[index]).tokens()
            times[index].append(time.perf_counter() - started_s)
    deviations = [np.abs(np.array(t[1:]) / np.median(t[1:]) - 1) for t in times.values()]
    return Errors.of(np.concatenate(deviations))
