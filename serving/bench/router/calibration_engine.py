"""What a calibrated engine has that others have not: a record of its steps, and replies by a script.

What the model draws is computed and then replaced by what the script says, so that a reply is as long as
the simulation knows it to be, and a later prompt that repeats it finds its blocks.
"""

from __future__ import annotations

import time

import msgspec

from cluster.load import StepCoefficients
from serving.engine.executor import Done, Executor
from serving.engine.plan import BlockCopies, SamplingBatch, StepPlan
from serving.engine.step_time import StepShape, StepTimeModel
from serving.model_spec import ModelSpec

OWN_PAUSE_MS = 5.0
"""A shorter pause between two steps is the engine's own work, a longer one is want of requests."""


class Script(msgspec.Struct, frozen=True, array_like=True):
    """What a request, known by its sampling seed, is to reply."""

    seed: int
    prompt_tokens: int
    token_ids: tuple[int, ...]


class StepRecord(msgspec.Struct, frozen=True, array_like=True):
    """One step's sizes and milliseconds, and the pause before it where that was the engine's own."""

    tokens: int
    kv_tokens: int
    num_logits: int
    attention_pairs: float
    ms: float
    pause_ms: float | None


class Learned(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine has learned of its steps, and the steps since it was last asked."""

    coefficients: StepCoefficients
    steps: tuple[StepRecord, ...]


class RecordingStepTime(StepTimeModel):
    """The engine's model of its steps, which besides keeps them."""

    def __init__(self, spec: ModelSpec, executor: Executor, kv_dtype: str) -> None:
        super().__init__(spec, kv_dtype, executor.measure_machine(), executor.bytes_per_weight)
        self._steps: list[StepRecord] = []
        self._ended_s = 0.0

    def observe(self, shape: StepShape, ms: float) -> None:
        now_s = time.perf_counter()
        pause_ms = (now_s - self._ended_s) * 1e3 - ms
        own_ms = max(0.0, pause_ms) if pause_ms < OWN_PAUSE_MS else None
        self._ended_s = now_s
        self._steps.append(
            StepRecord(shape.tokens, shape.kv_tokens, shape.num_logits, shape.attention_pairs, ms, own_ms)
        )
        super().observe(shape, ms)

    def take(self) -> Learned:
        """Everything since the last time."""
        steps, self._steps = tuple(self._steps), []
        return Learned(coefficients=self.coefficients, steps=steps)


class ScriptedExecutor:
    """An executor whose tokens are computed, and then replaced by the script's."""

    runs_ahead = False  # the script's token replaces the model's before the next step is planned

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._replies: dict[int, Script] = {}

    @property
    def num_blocks(self) -> int:
        return self._executor.num_blocks

    @property
    def num_host_blocks(self) -> int:
        return self._executor.num_host_blocks

    @property
    def bytes_per_weight(self) -> float:
        return self._executor.bytes_per_weight

    def follow(self, scripts: list[Script]) -> None:
        """From now on; earlier scripts are over."""
        self._replies = {script.seed: script for script in scripts}

    def launch(self, plan: StepPlan, sampling: SamplingBatch) -> Done:
        drawn = self._executor.launch(plan, sampling).tokens().copy()
        for row, (seed, position) in enumerate(
            zip(sampling.seed.tolist(), sampling.position.tolist(), strict=True)
        ):
            if drawn[row] >= 0:  # else it says that the logits were not finite
                script = self._replies[seed]
                drawn[row] = script.token_ids[position - script.prompt_tokens]
        return Done(drawn)

    def sleep(self, copies: BlockCopies) -> None:
        self._executor.sleep(copies)

    def wake(self) -> None:
        self._executor.wake()

    def close(self) -> None:
        self._executor.close()
