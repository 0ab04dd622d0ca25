"""Runs workloads on the engine in this process: once to warm up, some times that count, once traced."""

from __future__ import annotations

import time
from collections.abc import Callable

from serving.bench.engine.offline import EngineUnderTest
from serving.bench.engine.timeline import Timeline, Trace
from serving.bench.engine.workload_figures import WorkloadFigures, WorkloadRun, workload_figures
from serving.bench.engine.workloads import Workload
from serving.engine.machine import Machine
from serving.messages import StepFrame, StepStats

_SKIPPED_STEPS = 3  # a trace begins so many steps after the first that only decodes


def measure_workload(
    under_test: EngineUnderTest, workload: Workload, machine: Machine, repeats: int, traced_steps: int
) -> WorkloadFigures:
    """The figures of `repeats` runs, each with an empty cache. A prefill is not traced."""
    first_run_s = run_workload(under_test, workload).elapsed_s
    runs = [run_workload(under_test, workload) for _ in range(repeats)]
    timeline = None
    if workload.kind != "prefill":
        tracing = _Tracing(under_test.setup.device, traced_steps)
        run_workload(under_test, workload, tracing.on_step)
        timeline = tracing.end()
    bytes_per_weight = under_test.worker.bytes_per_weight
    return workload_figures(workload, under_test.spec, machine, first_run_s, runs, timeline, bytes_per_weight)


def run_workload(
    under_test: EngineUnderTest, workload: Workload, on_step: Callable[[StepStats], None] = lambda step: None
) -> WorkloadRun:
    """One run; nothing is cached of the runs before."""
    under_test.rebuild()
    steps: list[tuple[float, StepStats]] = []
    started_s = time.perf_counter()

    def seen(frame: StepFrame) -> None:
        if frame.stats is not None:
            steps.append((time.perf_counter() - started_s, frame.stats))
            on_step(frame.stats)

    record = under_test.run(workload.requests, seen)
    firsts_s = tuple(request.first_token_s for request in record.requests)
    return WorkloadRun(record.elapsed_s, firsts_s, tuple(steps))


class _Tracing:
    """A trace over `wanted` steps from soon after the first that does not prefill."""

    def __init__(self, device: str, wanted: int) -> None:
        self._trace = Trace(device)
        self._wanted = wanted
        self._steps_to_skip = _SKIPPED_STEPS
        self._traced = -1  # it has not begun
        self._timeline: Timeline | None = None

    def on_step(self, step: StepStats) -> None:
        if self._traced >= 0:
            self._traced += 1
            if self._traced == self._wanted:
                self._timeline = self._trace.stop(self._traced)
        elif step.prefill_tokens == 0 and self._steps_to_skip > 0:
            self._steps_to_skip -= 1
        elif step.prefill_tokens == 0:
            self._traced = 0
            self._trace.start()

    def end(self) -> Timeline | None:
        """What was traced, were it less than wanted."""
        if 0 <= self._traced < self._wanted:
            self._timeline = self._trace.stop(self._traced)
        return self._timeline
