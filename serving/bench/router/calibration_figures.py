"""What is compared: times of a real run beside those of its simulation. Pure.

A step with sizes `x` takes `x · θ` in the mean, the engine's own pause after it included. `θ ≥ 0` are
least squares over all steps of the rehearsal, `Σ (m - x·θ)² / m`, so that neither the many short ones nor
the few long ones decide alone, with what the engine has learned as the weak guess where they say nothing.
What is left is kept in the order in which it came: a machine that others use too is slow for a while.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
from numpy.typing import NDArray

from cluster.load import StepCoefficients
from serving.bench.engine.report import Verdict
from serving.bench.router.calibration_engine import Learned, StepRecord
from serving.bench.router.calibration_play import Served
from serving.bench.router.figures import percentile
from serving.engine.least_squares import non_negative_solution
from serving.simulator import DONE, SimRequest, SimResult

WITHIN = {"ttft_p50_s": 0.15, "ttft_p99_s": 0.25, "output_tokens_per_s": 0.15}
"""How far a simulated figure may be from the real one, as a part of it."""

WARM_UP_STEPS = 32
PULL = 1e-6  # towards the guess, as a part of all that was observed
LEAST_UNIT = 1e-6  # of the largest coefficient: below, one that was learned as 0 could not come back

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class StepFit:
    """What a replica's steps take: by `step` in the mean, by `pace` over time."""

    step: StepCoefficients
    pace: tuple[tuple[float, float], ...]  # (seconds taken, seconds foretold), one after another
    pause_ms: float
    median_error: float  # of |measured / foretold - 1|
    p95_error: float

    def begun_at(self, offset_s: float) -> tuple[tuple[float, float], ...]:
        """Its pace from so many seconds after the first step on."""
        ends_s = np.cumsum([taken_s for taken_s, _ in self.pace])
        first = int(np.searchsorted(ends_s, offset_s % ends_s[-1]))
        return (*self.pace[first:], *self.pace[:first])


def fit_of(learned: Learned) -> StepFit:
    """Of all steps but the first, which warm up what is compiled or read when it is needed."""
    steps = learned.steps[min(WARM_UP_STEPS, len(learned.steps) // 2) :]
    pauses_ms = [step.pause_ms for step in steps if step.pause_ms is not None]
    pause_ms = statistics.median(pauses_ms) if pauses_ms else 0.0
    measured = measured_ms(steps, pause_ms)
    step = _fitted(steps, measured, learned.coefficients)
    foretold = foretold_ms(steps, step)
    errors = np.abs(measured / foretold - 1)
    return StepFit(
        step=step,
        pace=tuple(zip((measured / 1e3).tolist(), (foretold / 1e3).tolist(), strict=True)),
        pause_ms=pause_ms,
        median_error=float(np.median(errors)),
        p95_error=float(np.quantile(errors, 0.95)),
    )


def measured_ms(steps: Sequence[StepRecord], pause_ms: float) -> Floats:
    """Of each step with the pause before it; the usual one where it waited for requests."""
    return np.array([step.ms + (pause_ms if step.pause_ms is None else step.pause_ms) for step in steps])


def foretold_ms(steps: Sequence[StepRecord], step: StepCoefficients) -> Floats:
    return np.array(
        [step.predict_ms(s.tokens, s.kv_tokens, s.num_logits, s.attention_pairs) for s in steps], dtype=float
    )


def _fitted(steps: Sequence[StepRecord], measured: Floats, guess: StepCoefficients) -> StepCoefficients:
    """The least squares at the top of the file, then scaled so that the sums of both sides are equal."""
    flat = _flat(guess)
    units = np.maximum(flat, LEAST_UNIT * flat.max())  # the fit's coefficients are around 1 in these
    sizes = [foretold_ms(steps, _coefficients(one)) for one in np.diag(units)]
    rows = np.array(sizes).T / np.sqrt(measured)[:, None]
    matrix, vector = rows.T @ rows, rows.T @ np.sqrt(measured)
    pull = PULL * float(np.trace(matrix))
    near = flat / units
    solution = non_negative_solution(matrix + pull * np.eye(len(flat)), vector + pull * near, near > 0)
    found = solution * units
    return _coefficients(found * measured.sum() / foretold_ms(steps, _coefficients(found)).sum())


def _flat(step: StepCoefficients) -> Floats:
    base, token, kv, logit, pair, small = msgspec.structs.astuple(step)
    return np.array([base, token, kv, logit, pair, *small])


def _coefficients(flat: Floats) -> StepCoefficients:
    base, token, kv, logit, pair, *small = flat.tolist()
    return StepCoefficients(base, token, kv, logit, pair, tuple(small))


class RunTimes(msgspec.Struct, frozen=True, kw_only=True):
    """A run's figures. Who was not served counts as a time of infinity."""

    ttft_p50_s: float
    ttft_p99_s: float
    output_tokens_per_s: float  # from the first arrival to the last token
    ttft_mean_s: float
    tpot_p50_ms: float
    tpot_p99_ms: float
    hit_share: float  # of the prompts' tokens
    busy_share: float  # of the replicas' time
    refusals: float


def real_times(requests: Sequence[SimRequest], served: Sequence[Served], busy_s: Sequence[float]) -> RunTimes:
    """`busy_s` is of each replica."""
    done = np.array([one.failure is None for one in served])
    first_s = np.array([math.nan if one.first_token_s is None else one.first_token_s for one in served])
    arrival_s = np.array([one.arrival_s for one in served])
    ended_s = np.array([one.ended_s for one in served])
    return _times(
        requests,
        done,
        ttft_s=first_s - arrival_s,
        between_s=ended_s - first_s,
        output_tokens=np.array([one.output_tokens for one in served]),
        cached_tokens=np.array([one.cached_tokens for one in served]),
        refusals=sum(one.refusals for one in served),
        duration_s=float((ended_s - arrival_s[0]).max()),
        busy_s=busy_s,
    )


def simulated_times(requests: Sequence[SimRequest], result: SimResult) -> RunTimes:
    """`requests` are in order of arrival."""
    return _times(
        requests,
        result.outcome == DONE,
        ttft_s=result.ttft_s,
        between_s=result.e2e_s - result.ttft_s,
        output_tokens=result.output_tokens,
        cached_tokens=result.cached_tokens,
        refusals=int(result.refusals.sum()),
        duration_s=result.duration_s - requests[0].arrival_s,
        busy_s=result.busy_s.tolist(),
    )


def _times(
    requests: Sequence[SimRequest],
    done: NDArray[np.bool_],
    *,
    ttft_s: Floats,
    between_s: Floats,
    output_tokens: NDArray[np.int64],
    cached_tokens: NDArray[np.int64],
    refusals: int,
    duration_s: float,
    busy_s: Sequence[float],
) -> RunTimes:
    several = done & (output_tokens > 1)
    tpot_ms = 1e3 * between_s[several] / (output_tokens[several] - 1)
    return RunTimes(
        ttft_p50_s=percentile(ttft_s, done, 50),
        ttft_p99_s=percentile(ttft_s, done, 99),
        output_tokens_per_s=float(output_tokens[done].sum()) / duration_s,
        ttft_mean_s=float(np.where(done, ttft_s, np.inf).mean()),
        tpot_p50_ms=percentile(tpot_ms, np.ones_like(tpot_ms, dtype=bool), 50),
        tpot_p99_ms=percentile(tpot_ms, np.ones_like(tpot_ms, dtype=bool), 99),
        hit_share=float(cached_tokens[done].sum()) / sum(request.prompt_tokens for request in requests),
        busy_share=sum(busy_s) / (len(busy_s) * duration_s),
        refusals=refusals,
    )


def median_of(runs: Sequence[RunTimes]) -> RunTimes:
    """Figure by figure."""
    names = RunTimes.__struct_fields__
    return RunTimes(**{name: statistics.median(getattr(run, name) for run in runs) for name in names})


def ratio(real: RunTimes, simulated: RunTimes, name: str) -> float:
    """The simulated figure over the real one."""
    one, other = float(getattr(simulated, name)), float(getattr(real, name))
    return one / other if other else math.nan


def verdicts_of(real: RunTimes, simulated: RunTimes) -> tuple[Verdict, ...]:
    found = []
    for name, most in WITHIN.items():
        measured = ratio(real, simulated, name)
        found.append(Verdict(name, f"1 ± {most:g}", measured, abs(measured - 1) <= most))
    return tuple(found)
