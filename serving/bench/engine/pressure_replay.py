"""A load whose output lengths only the bench knows, replayed through the production scheduler.

    line ──offer──► Scheduler ──step──► StepRunner ──tokens──► Scheduler

Clients ask for far more tokens than they will get, as real ones do; the runner draws the stop token
where a request's true length is reached, so nothing but the bench (and its oracle) can know it before.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from cluster.load import StepCoefficients
from serving.engine.executor import Executor
from serving.engine.growth import OutputGrowth
from serving.engine.scheduled_step import ScheduledStep, build_plan
from serving.engine.scheduler import Scheduler
from serving.engine.step_time import StepShape, StepTimeModel
from serving.messages import SamplingParams, Submit

STOP_TOKEN = 0
PROMPT_IDS = 1000  # any model knows so many
OTHER_TOKEN = 1  # drawn instead of a stop token that comes too early


@dataclass(frozen=True)
class LoadShape:
    """Log-normal lengths in tokens, all requests there at once.

    The outputs are those of the Azure conversation trace of 2023 (log mean 5.02, deviation 0.86, at
    most 1,000: 218 tokens in the mean, with a long tail), its prompts are divided by eight, so that
    the time goes to decoding, where blocks run out.
    """

    num_requests: int = 128
    prompt_log_mean: float = 6.63 - np.log(8)
    prompt_log_std: float = 0.98
    output_log_mean: float = 5.02
    output_log_std: float = 0.86
    max_prompt_tokens: int = 1000
    max_output_tokens: int = 1000
    asked_tokens: int = 2048  # every client's max_tokens


@dataclass(frozen=True)
class KnownRequest:
    """`submit` is what the engine is told, `output_tokens` what will come of it."""

    submit: Submit
    output_tokens: int

    @property
    def prompt_tokens(self) -> int:
        return len(self.submit.token_ids)

    @property
    def needed_tokens(self) -> int:
        """Tokens to compute if none is computed twice: the last output never is."""
        return self.prompt_tokens + self.output_tokens - 1


def draw_load(shape: LoadShape, block_tokens: int, seed: int) -> list[KnownRequest]:
    """`shape`'s requests. Prompts are random, so that none shares a prefix; reservations are the Router's."""
    rng = np.random.default_rng(seed)

    def lengths(log_mean: float, log_std: float, most: int) -> list[int]:
        drawn = rng.lognormal(log_mean, log_std, shape.num_requests)
        return np.clip(np.rint(drawn), 2, most).astype(int).tolist()

    prompts = lengths(shape.prompt_log_mean, shape.prompt_log_std, shape.max_prompt_tokens)
    outputs = lengths(shape.output_log_mean, shape.output_log_std, shape.max_output_tokens)
    growth = round(sum(outputs) / len(outputs))  # what a Router that knows this load expects
    return [
        KnownRequest(
            submit=Submit(
                request_id=str(index),
                token_ids=tuple(rng.integers(2, PROMPT_IDS, prompt).tolist()),
                sampling=SamplingParams(
                    max_tokens=shape.asked_tokens, temperature=0.0, stop_token_ids=(STOP_TOKEN,)
                ),
                reserve_blocks=-(-(prompt + growth) // block_tokens),
                hash_root=b"pressure",
            ),
            output_tokens=output,
        )
        for index, (prompt, output) in enumerate(zip(prompts, outputs, strict=True))
    ]


class Line(Protocol):
    """Requests that are not yet the scheduler's. `offer` submits those whose time has come.

    `foresight` is what the scheduler behind it uses to look ahead.
    """

    @property
    def foresight(self) -> type[OutputGrowth]: ...

    def offer(self, scheduler: Scheduler, now_s: float) -> None: ...


class StepRunner(Protocol):
    """Runs a step, on a clock of its own."""

    def clock(self) -> float: ...

    def run(self, step: ScheduledStep) -> NDArray[np.int32]: ...


class CostedSteps:
    """Takes a step's predicted time on a simulated clock, and computes nothing."""

    def __init__(self, coefficients: StepCoefficients, requests: Sequence[KnownRequest]) -> None:
        self._coefficients = coefficients
        self._lengths = lengths_of(requests)
        self._now_s = 0.0

    def clock(self) -> float:
        return self._now_s

    def run(self, step: ScheduledStep) -> NDArray[np.int32]:
        shape = StepShape.of(step)
        self._now_s += self._coefficients.predict_ms(*astuple(shape)) / 1e3
        return np.where(_ends(step, self._lengths), STOP_TOKEN, OTHER_TOKEN).astype(np.int32)


class RealSteps:
    """Runs steps on a model; of its tokens only where they end is changed. Teaches `step_time` each step."""

    def __init__(
        self,
        executor: Executor,
        step_time: StepTimeModel,
        block_tokens: int,
        requests: Sequence[KnownRequest],
    ) -> None:
        self._executor = executor
        self._step_time = step_time
        self._block_tokens = block_tokens
        self._lengths = lengths_of(requests)

    def clock(self) -> float:
        return time.perf_counter()

    def run(self, step: ScheduledStep) -> NDArray[np.int32]:
        started_s = self.clock()
        drawn = self._executor.launch(*build_plan(step, self._block_tokens)).tokens()
        self._step_time.observe(StepShape.of(step), (self.clock() - started_s) * 1e3)
        drawn = np.where(drawn == STOP_TOKEN, OTHER_TOKEN, drawn)
        return np.where(_ends(step, self._lengths), STOP_TOKEN, drawn).astype(np.int32)


@dataclass(frozen=True)
class Replayed:
    """What a load came to. Seconds are those of the steps: scheduling is counted, submitting is not."""

    elapsed_s: float
    num_steps: int
    computed_tokens: int
    needed_tokens: int
    output_tokens: int
    num_preemptions: int
    peak_blocks: int

    @property
    def tokens_per_s(self) -> float:
        return self.output_tokens / self.elapsed_s

    @property
    def mean_batch(self) -> float:
        """Outputs a step."""
        return self.output_tokens / self.num_steps

    @property
    def recomputed_share(self) -> float:
        return (self.computed_tokens - self.needed_tokens) / self.computed_tokens


def replay(
    requests: Sequence[KnownRequest], line: Line, scheduler: Scheduler, runner: StepRunner
) -> Replayed:
    """Run all of `requests`, which stand in `line`, to their ends."""
    elapsed_s = 0.0
    num_steps = computed = outputs = num_preemptions = peak_blocks = 0
    while True:
        line.offer(scheduler, runner.clock())
        started_s = runner.clock()
        step = scheduler.schedule(started_s)
        if step is None:
            break
        peak_blocks = max(peak_blocks, scheduler.pool.num_blocks - scheduler.pool.num_available)
        deltas = scheduler.complete(step, runner.run(step), runner.clock())
        elapsed_s += runner.clock() - started_s
        num_steps += 1
        computed += sum(chunk.num_tokens for chunk in step.chunks)
        outputs += sum(len(delta.token_ids) for delta in deltas)
        num_preemptions += step.num_preemptions
    assert outputs == sum(request.output_tokens for request in requests), "somebody got other than its length"
    return Replayed(
        elapsed_s=elapsed_s,
        num_steps=num_steps,
        computed_tokens=computed,
        needed_tokens=sum(request.needed_tokens for request in requests),
        output_tokens=outputs,
        num_preemptions=num_preemptions,
        peak_blocks=peak_blocks,
    )


def lengths_of(requests: Sequence[KnownRequest]) -> dict[str, int]:
    """Prompt and outputs together, a request."""
    return {request.submit.request_id: request.needed_tokens + 1 for request in requests}


def _ends(step: ScheduledStep, lengths: Mapping[str, int]) -> list[bool]:
    """Of the chunks that want a token: whether that is their request's last."""
    return [chunk.end + 1 >= lengths[chunk.sequence.request_id] for chunk in step.chunks if chunk.wants_token]
