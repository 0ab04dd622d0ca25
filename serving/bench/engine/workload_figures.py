"""A workload's figures, made of its runs. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from serving.bench.engine.figures import percentile
from serving.bench.engine.floors import phase_floor, steps_floor_s
from serving.bench.engine.timeline import Timeline
from serving.bench.engine.workloads import Kind, Workload
from serving.engine.machine import Machine
from serving.messages import StepStats
from serving.model_spec import ModelSpec


@dataclass(frozen=True)
class WorkloadRun:
    """One run: seconds from its start to its end, to each request's first token, and to each step's news."""

    elapsed_s: float
    first_tokens_s: tuple[float, ...]
    steps: tuple[tuple[float, StepStats], ...]

    @property
    def decode_window(self) -> tuple[float, list[StepStats]]:
        """Seconds of the steps after the last one that prefilled, and those steps."""
        last_prefill = max((i for i, (_, step) in enumerate(self.steps) if step.prefill_tokens), default=0)
        steps = [step for _, step in self.steps[last_prefill + 1 :]]
        return self.steps[-1][0] - self.steps[last_prefill][0], steps


class WorkloadFigures(msgspec.Struct, frozen=True, kw_only=True):
    """Of the median run, by its seconds; shares are of the floors that `floors` describes.

    `first_run_s` is the run before those that count: it compiles kernels and captures graphs.
    `tokens_per_s` counts tokens out, for a prefill those of the prompts. Step figures are of the steps
    that only decode where the workload is about these, else of all. The idle shares are the profiler's,
    and that of its busy time in a step as long as steps are without it.
    """

    name: str
    kind: Kind
    requests: int
    tokens_in: int
    tokens_out: int
    first_run_s: float
    elapsed_s: float
    all_elapsed_s: tuple[float, ...]
    tokens_per_s: float
    phase_floor_s: float
    phase_floor_share: float
    steps: int
    step_ms: float
    step_floor_ms: float
    step_floor_share: float
    bandwidth_share: float
    tflops: float
    ttft_p50_ms: float
    schedule_p50_ms: float
    schedule_p99_ms: float
    timeline: Timeline | None = None
    traced_idle_share: float | None = None
    untraced_idle_share: float | None = None


def workload_figures(
    workload: Workload,
    spec: ModelSpec,
    machine: Machine,
    first_run_s: float,
    runs: Sequence[WorkloadRun],
    timeline: Timeline | None,
    bytes_per_weight: float,
) -> WorkloadFigures:
    """The figures of `runs`, at least one."""
    ordered = sorted(runs, key=lambda run: run.elapsed_s)
    run = ordered[len(ordered) // 2]
    decodes = workload.kind in ("decode", "context")
    window_s, steps = run.decode_window if decodes else (run.elapsed_s, [step for _, step in run.steps])
    assert steps, f"{workload.name}: no step to measure"
    step_ms = 1e3 * window_s / len(steps)
    floor_s = steps_floor_s(machine, steps)
    phases = phase_floor(spec, machine, workload.lengths, bytes_per_weight)
    scheduled_ms = [step.schedule_ms for step in steps]
    counted = workload.tokens_in if workload.kind == "prefill" else workload.tokens_out
    untraced = None
    if decodes and timeline is not None:
        untraced = 1 - timeline.busy_ms_per_step / step_ms
    return WorkloadFigures(
        name=workload.name,
        kind=workload.kind,
        requests=len(workload.requests),
        tokens_in=workload.tokens_in,
        tokens_out=workload.tokens_out,
        first_run_s=first_run_s,
        elapsed_s=run.elapsed_s,
        all_elapsed_s=tuple(one.elapsed_s for one in runs),
        tokens_per_s=counted / run.elapsed_s,
        phase_floor_s=phases.total_s,
        phase_floor_share=phases.total_s / run.elapsed_s,
        steps=len(steps),
        step_ms=step_ms,
        step_floor_ms=1e3 * floor_s / len(steps),
        step_floor_share=floor_s / window_s,
        bandwidth_share=sum(step.bytes_moved for step in steps) / machine.bytes_per_s / window_s,
        tflops=sum(step.flops for step in steps) / window_s / 1e12,
        ttft_p50_ms=1e3 * percentile(run.first_tokens_s, 50),
        schedule_p50_ms=percentile(scheduled_ms, 50),
        schedule_p99_ms=percentile(scheduled_ms, 99),
        timeline=timeline,
        traced_idle_share=None if timeline is None else timeline.idle_share,
        untraced_idle_share=untraced,
    )
