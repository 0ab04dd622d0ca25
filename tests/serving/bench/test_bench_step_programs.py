"""The verdicts of `--tpot-ms` and `--step-time`, from records made by hand."""

from dataclasses import replace

import numpy as np
import pytest

from serving.bench.engine.offline import RequestRecord, RunRecord
from serving.bench.engine.step_accuracy import Errors, StepAccuracy
from serving.bench.engine.tpot import FixedCap, TpotResult, TpotRun, summarise
from serving.messages import StepStats

STEP = StepStats(
    step_ms=10.0, predicted_ms=11.0, schedule_ms=0.1, batch_size=2, prefill_tokens=0, decode_tokens=2,
    flops=1.0, bytes_moved=1.0, num_preemptions=0, prefix_hit_tokens=0, prefix_query_tokens=0,
)  # fmt: skip


def a_request(*token_times_s: float) -> RequestRecord:
    return RequestRecord(
        submitted_s=0.0,
        first_token_s=token_times_s[0],
        token_times_s=token_times_s,
        output_ids=(1,) * len(token_times_s),
        finish_reason="length",
        cached_tokens=0,
    )


def test_tpot_is_a_requests_mean_and_the_interval_a_tokens() -> None:
    """Two requests of 20 and 10 ms a token; the slower has one interval of 30 ms in it."""
    requests = (a_request(1.0, 1.03, 1.04), a_request(1.0, 1.01))
    record = RunRecord(elapsed_s=2.0, requests=requests, steps=(STEP, STEP), forward_ms=(1.0, 1.0))
    run = summarise(record)
    assert run.tokens_per_s == 2.5 and run.mean_batch == 2.0
    assert (run.p50_tpot_ms, run.p99_tpot_ms) == pytest.approx((15.0, 19.9))
    assert run.p99_interval_ms == pytest.approx(np.quantile([30.0, 10.0, 10.0], 0.99))


@pytest.mark.parametrize(
    ("tokens_per_s", "p99_ms", "passes"), [(95.0, 109.0, True), (89.0, 90.0, False), (120.0, 111.0, False)]
)
def test_the_governor_must_keep_both_the_target_and_the_throughput(tokens_per_s, p99_ms, passes) -> None:
    """Target 100 ms: p99 at most 110, and at least 90 of the fixed cap's 100 tokens/s."""
    fixed = TpotRun(100.0, 80.0, 95.0, 150.0, 16.0)
    governed = replace(fixed, tokens_per_s=tokens_per_s, p99_tpot_ms=p99_ms)
    result = TpotResult(100.0, FixedCap(16, 512), (fixed,) * 3, (governed,) * 3)
    assert result.passes == passes
    assert result.throughput_share == pytest.approx(tokens_per_s / 100)


@pytest.mark.parametrize(
    ("predicted", "noise", "passes"),
    [
        (Errors(0.05, 0.15), Errors(0.01, 0.02), True),
        (Errors(0.06, 0.10), Errors(0.01, 0.02), False),
        (Errors(0.06, 0.19), Errors(0.05, 0.15), True),
        (Errors(0.04, 0.21), Errors(0.05, 0.15), False),
    ],
)
def test_predictions_are_held_to_the_target_or_to_the_noise(predicted, noise, passes) -> None:
    """5 % in the median and 15 % at p95; where identical steps differ by more, 1.3 times that."""
    assert StepAccuracy(400, predicted, noise).passes == passes
