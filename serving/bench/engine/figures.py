"""What is measured of one engine at one load, and the figures made of it. Pure."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec
import numpy as np

from serving.engine.machine import Machine
from serving.messages import StepStats

Kind = Literal["decode", "prefill"]


class Load(msgspec.Struct, frozen=True):
    """`batch` sequences at once, all of the same lengths. A "prefill" load draws one token only."""

    kind: Kind
    batch: int
    prompt_tokens: int
    new_tokens: int

    @property
    def counted_tokens(self) -> int:
        """The tokens its rate counts: new ones, or for a prefill those of the prompts."""
        return self.batch * (self.prompt_tokens if self.kind == "prefill" else self.new_tokens)


@dataclass(frozen=True)
class Sample:
    """One run of a load. Token times are seconds from its start; steps are known of our engine only."""

    elapsed_s: float
    token_times_s: tuple[tuple[float, ...], ...]
    output_ids: tuple[tuple[int, ...], ...]
    steps: tuple[StepStats, ...] = ()
    forward_ms: tuple[float, ...] = ()


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """One row's figures at one load. Rates are medians over its runs; None is not known.

    `overhead_share` is the part of a step that is not the model's forward. The shares of bandwidth,
    compute and floor say how much of what the machine was measured to do the steps got; they, and the
    overhead, are of pure decode steps, for a prefill load of all steps.
    """

    row: str
    load: Load
    tokens_per_s: float
    slowest_tokens_per_s: float
    fastest_tokens_per_s: float
    ttft_p50_ms: float
    tpot_p50_ms: float | None
    tpot_p99_ms: float | None
    overhead_share: float | None = None
    bandwidth_share: float | None = None
    compute_share: float | None = None
    floor_share: float | None = None
    linear_bound_tokens_per_s: float | None = None
    linear_bound_share: float | None = None
    first_token_agreement: float | None = None


def summarise(
    row: str,
    load: Load,
    samples: Sequence[Sample],
    *,
    machine: Machine | None = None,
    linear_step_s: float | None = None,
    reference: Sequence[Sample] = (),
) -> Point:
    """The figures of `samples`, at least one.

    `linear_step_s` is what the linear layers and the head alone take at this batch; `reference` another
    row's runs on the same prompts, for the share of equal first tokens.
    """
    rates = [load.counted_tokens / sample.elapsed_s for sample in samples]
    firsts_s = [times[0] for sample in samples for times in sample.token_times_s]
    gaps_s = [
        after - before
        for sample in samples
        for times in sample.token_times_s
        for before, after in itertools.pairwise(times)
    ]
    tpot_p50_ms = percentile(gaps_s, 50) * 1e3 if gaps_s else None
    bound = None if linear_step_s is None else load.batch / linear_step_s
    return Point(
        row=row,
        load=load,
        tokens_per_s=percentile(rates, 50),
        slowest_tokens_per_s=min(rates),
        fastest_tokens_per_s=max(rates),
        ttft_p50_ms=percentile(firsts_s, 50) * 1e3,
        tpot_p50_ms=tpot_p50_ms,
        tpot_p99_ms=percentile(gaps_s, 99) * 1e3 if gaps_s else None,
        linear_bound_tokens_per_s=bound,
        linear_bound_share=load.batch * 1e3 / tpot_p50_ms / bound if bound and tpot_p50_ms else None,
        first_token_agreement=first_token_agreement(samples, reference),
        **_step_shares(load, samples, machine),
    )


def percentile(values: Sequence[float], percent: float) -> float:
    """Linearly interpolated between the two nearest of `values`, at least one."""
    return float(np.percentile(values, percent))


def first_token_agreement(samples: Sequence[Sample], reference: Sequence[Sample]) -> float | None:
    """The share of sequences whose first token is the reference's; None without any."""
    equal = [
        ours[0] == theirs[0]
        for sample, other in zip(samples, reference, strict=False)
        for ours, theirs in zip(sample.output_ids, other.output_ids, strict=True)
    ]
    return sum(equal) / len(equal) if equal else None


def _step_shares(load: Load, samples: Sequence[Sample], machine: Machine | None) -> dict[str, float]:
    steps = [
        (step, forward_ms)
        for sample in samples
        for step, forward_ms in zip(sample.steps, sample.forward_ms, strict=True)
        if load.kind == "prefill" or step.prefill_tokens == 0
    ]
    if not steps:
        return {}
    step_ms = sum(step.step_ms for step, _ in steps)
    shares = {"overhead_share": 1 - sum(forward_ms for _, forward_ms in steps) / step_ms}
    if machine is not None:
        bytes_moved = sum(step.bytes_moved for step, _ in steps)
        flops = sum(step.flops for step, _ in steps)
        shares |= {
            "bandwidth_share": bytes_moved / machine.bytes_per_s / (step_ms / 1e3),
            "compute_share": flops / machine.flops_per_s / (step_ms / 1e3),
            "floor_share": sum(machine.floor_ms(step.flops, step.bytes_moved) for step, _ in steps) / step_ms,
        }
    return shares
