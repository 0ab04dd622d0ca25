"""The least time that work can take on a machine, by the roofline of `step_time`. Pure.

    of steps that ran    Σ max(FLOPs / F, bytes / BW) over the steps as they were scheduled
    of phases            prompts in one step as large as they are, then a step a token for all that still run;
                         what a scheduler makes of the requests does not enter it, so engines can be
                         compared by it

F and BW are what was measured on the machine in the same run.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from serving.engine.machine import Machine
from serving.engine.step_time import StepShape, step_bytes, step_flops
from serving.messages import StepStats
from serving.model_spec import ModelSpec


@dataclass(frozen=True)
class PhaseFloor:
    """Seconds of a set of requests that are there from the start."""

    prefill_s: float
    decode_s: float

    @property
    def total_s(self) -> float:
        return self.prefill_s + self.decode_s


def phase_floor(
    spec: ModelSpec,
    machine: Machine,
    lengths: Sequence[tuple[int, int]],
    weight_bytes: float = 2.0,
    kv_bytes: int = 2,
) -> PhaseFloor:
    """Of requests with so many tokens in and out each, in bytes a weight and a KV value.

    A prompt's last token gives the first answer token, so n tokens out are n - 1 steps of decoding.
    """

    def floor_s(shape: StepShape) -> float:
        bytes_moved = step_bytes(spec, shape, weight_bytes, kv_bytes)
        return machine.floor_ms(step_flops(spec, shape), bytes_moved) / 1e3

    tokens_in = sum(tokens for tokens, _ in lengths)
    pairs = sum(tokens * tokens / 2 for tokens, _ in lengths)
    prefill_s = floor_s(StepShape(tokens_in, tokens_in, len(lengths), pairs))
    decode_s = 0.0
    for step in range(1, max(out for _, out in lengths)):
        contexts = [tokens + step for tokens, out in lengths if out > step]
        kv_tokens = sum(contexts)
        decode_s += floor_s(StepShape(len(contexts), kv_tokens, len(contexts), kv_tokens))
    return PhaseFloor(prefill_s, decode_s)


def steps_floor_s(machine: Machine, steps: Iterable[StepStats]) -> float:
    """Of the steps that ran."""
    return sum(machine.floor_ms(step.flops, step.bytes_moved) for step in steps) / 1e3
