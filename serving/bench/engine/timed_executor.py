"""The worker with a clock in it: how long the model's forward takes, apart from the rest of a step."""

from __future__ import annotations

import time
from typing import Any

from serving.engine.executor import Launched
from serving.engine.machine import Machine
from serving.engine.plan import BlockCopies, SamplingBatch, StepPlan
from serving.engine.worker import Worker


class TimedExecutor:
    """A worker whose model forward is timed, apart from the sampling that follows it."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self.forward_ms: list[float] = []
        self.runner = worker._runner
        worker._runner = _TimedRunner(self.runner, self.forward_ms)  # type: ignore[assignment]

    @property
    def num_blocks(self) -> int:
        return self._worker.num_blocks

    @property
    def num_host_blocks(self) -> int:
        return self._worker.num_host_blocks

    @property
    def bytes_per_weight(self) -> float:
        return self._worker.bytes_per_weight

    def measure_machine(self) -> Machine:
        return self._worker.measure_machine()

    @property
    def runs_ahead(self) -> bool:
        return self._worker.runs_ahead

    def launch(self, plan: StepPlan, sampling: SamplingBatch) -> Launched:
        return self._worker.launch(plan, sampling)

    def sleep(self, copies: BlockCopies) -> None:
        self._worker.sleep(copies)

    def wake(self) -> None:
        self._worker.wake()

    def close(self) -> None:
        self._worker.close()


class _TimedRunner:
    """The worker's runner; its `logits` leaves its milliseconds in `forward_ms`."""

    def __init__(self, runner: Any, forward_ms: list[float]) -> None:
        self._runner = runner
        self._forward_ms = forward_ms

    def logits(self, plan: StepPlan) -> Any:
        started_s = time.perf_counter()
        logits = self._runner.logits(plan)
        self._forward_ms.append((time.perf_counter() - started_s) * 1e3)
        return logits

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)
