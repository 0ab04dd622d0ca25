"""The calibration of the simulator: its fit, its figures, its protocol. Engines have no model here."""

import asyncio
import io
import math
import multiprocessing
from dataclasses import replace

import fake_replica
import msgspec
import numpy as np
import pytest
from rich.console import Console

from cluster.load import StepCoefficients
from serving.bench.router.calibrate import CalibrationPlan, measure
from serving.bench.router.calibration_engine import Learned, StepRecord
from serving.bench.router.calibration_figures import (
    RunTimes,
    fit_of,
    foretold_ms,
    median_of,
    real_times,
    simulated_times,
    verdicts_of,
)
from serving.bench.router.calibration_fleet import started
from serving.bench.router.calibration_load import PLAN, poisson, real_requests, scaled_to
from serving.bench.router.calibration_pipe import Pipe
from serving.bench.router.calibration_play import Served, play
from serving.bench.router.calibration_replica import ModelFacts, ReplicaOptions
from serving.bench.router.calibration_report import print_calibration, write_json
from serving.bench.router.policies import searoom
from serving.errors import ReplicaGone
from serving.simulator import SimReplica, SimRequest, SimSetup, simulate
from serving.simulator.pace import Pace

BLOCK = 16
FACTS = ModelFacts(
    name="m", weight_version="1", kv_dtype="bfloat16", vocab_size=50_000, context_tokens=8192, stop_token_id=2
)
STEP = StepCoefficients(10.0, 0.5, 0.001, 0.2, 0.0001, (0.1, 0.2, 0.3))
OPTIONS = tuple(ReplicaOptions(name=f"replica-{number}", num_blocks=256) for number in range(2))


def shared(one, other):
    """How many leading names two chains have in common."""
    return next(
        (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )


def times(**figures):
    return RunTimes(**{
        "ttft_p50_s": 0.2, "ttft_p99_s": 1.0, "output_tokens_per_s": 100.0, "ttft_mean_s": 0.3,
        "tpot_p50_ms": 20.0, "tpot_p99_ms": 50.0, "hit_share": 0.5, "busy_share": 0.8, "refusals": 0,
    } | figures)  # fmt: skip


def setup_of(**replica):
    spec = SimReplica(
        name="replica-0", region="local", num_blocks=256, step=STEP, max_step_tokens=256, max_num_seqs=16
    )
    return SimSetup(replicas=(replace(spec, **replica),), block_tokens=BLOCK)


# ---- requests ---------------------------------------------------------------------------------


def test_prompts_share_real_blocks_exactly_where_their_simulated_blocks_are_shared():
    requests = poisson(replace(PLAN, num_requests=80), BLOCK, seed=3).requests
    real = real_requests(requests, FACTS, BLOCK)
    pairs = [(one, other) for one in real for other in real]
    simulated = [shared(a.simulated.block_hashes, b.simulated.block_hashes) for a, b in pairs]
    assert simulated == [shared(a.route.block_hashes, b.route.block_hashes) for a, b in pairs]
    assert any(0 < n < len(a.route.block_hashes) for n, (a, _) in zip(simulated, pairs, strict=True))


def test_a_later_turn_repeats_the_reply_before_it_but_for_the_token_that_ended_it():
    requests = poisson(replace(PLAN, num_requests=80), BLOCK, seed=3).requests
    real = real_requests(requests, FACTS, BLOCK)
    for one in real:
        later = next((r for r in real if r.simulated.session == one.simulated.session
                      and r.simulated.prompt_tokens > one.simulated.prompt_tokens), None)  # fmt: skip
        text = one.submit.token_ids + one.script.token_ids[:-1]
        whole = len(text) // BLOCK * BLOCK
        if later is not None and whole > one.simulated.prompt_tokens:
            assert later.submit.token_ids[:whole] == text[:whole]
            return
    pytest.fail("no reply of this workload fills a block")


def test_a_script_ends_its_reply_with_the_stop_token_at_the_simulated_length():
    for one in real_requests(poisson(replace(PLAN, num_requests=40), BLOCK, 0).requests, FACTS, BLOCK):
        assert len(one.submit.token_ids) == one.simulated.prompt_tokens
        assert len(one.script.token_ids) == one.simulated.output_tokens < one.submit.sampling.max_tokens
        assert one.script.token_ids.index(2) == one.simulated.output_tokens - 1


def test_arrivals_have_exponential_gaps_and_the_load_that_is_asked_for():
    """Mean and deviation of an exponential are equal; half the load is twice the time."""
    workload = poisson(PLAN, BLOCK, seed=1)
    gaps_s = np.diff([request.arrival_s for request in workload.requests])
    assert len(gaps_s) == 999
    assert gaps_s.std() / gaps_s.mean() == pytest.approx(1.0, abs=0.1)
    full, half = (scaled_to(workload, setup_of(), load).span_s for load in (0.8, 0.4))
    assert half == pytest.approx(2 * full)


# ---- figures ----------------------------------------------------------------------------------


def steps_of(noise, pause_ms=1.0):
    rng = np.random.default_rng(0)
    shapes = [
        (int(n), int(n) * 200, min(16, int(n)), float(n) * 100) for n in rng.integers(1, 200, len(noise))
    ]
    return tuple(
        StepRecord(*shape, float(STEP.predict_ms(*shape) * factor), pause_ms if index % 7 else None)
        for index, (shape, factor) in enumerate(zip(shapes, noise, strict=True))
    )


def test_a_fit_finds_the_coefficients_of_steps_without_noise_from_a_wrong_guess():
    wrong = StepCoefficients(3.0, 2.0, 0.0, 0.1, 0.0, (1.0, 1.0, 1.0))
    fit = fit_of(Learned(coefficients=wrong, steps=steps_of(np.ones(400))))
    later = steps_of(np.ones(400))[32:]
    assert fit.pause_ms == 1.0
    assert foretold_ms(later, fit.step) == pytest.approx(foretold_ms(later, STEP) + 1.0, rel=0.03)
    assert fit.median_error < 0.01


def test_a_fit_foretells_the_sum_of_noisy_steps_and_keeps_each_of_them_in_order():
    noise = np.random.default_rng(1).lognormal(0.2, 0.1, 400)
    steps = steps_of(noise)
    fit = fit_of(Learned(coefficients=STEP, steps=steps))
    later = steps[32:]
    taken_s, foretold_s = np.array(fit.pace).T
    assert taken_s == pytest.approx([(step.ms + 1.0) / 1e3 for step in later])
    assert foretold_s == pytest.approx(foretold_ms(later, fit.step) / 1e3)
    assert taken_s.sum() == pytest.approx(foretold_s.sum())
    assert np.corrcoef(taken_s / foretold_s, noise[32:])[0, 1] > 0.9
    turned = fit.begun_at(float(taken_s[:100].sum()) + 1e-6)
    assert turned == (*fit.pace[100:], *fit.pace[:100])


def test_only_figures_within_their_part_of_the_real_one_pass():
    held = {v.what: v.holds for v in verdicts_of(times(), times(ttft_p50_s=0.229, ttft_p99_s=0.76))}
    assert held == {"ttft_p50_s": True, "ttft_p99_s": True, "output_tokens_per_s": True}
    off = times(ttft_p50_s=0.232, ttft_p99_s=0.74, output_tokens_per_s=84.0)
    assert not any(verdict.holds for verdict in verdicts_of(times(), off))
    assert not verdicts_of(times(), times(ttft_p99_s=math.inf))[1].holds


def test_the_median_run_is_taken_figure_by_figure():
    runs = [times(ttft_p50_s=a, ttft_p99_s=b) for a, b in ((1, 9), (2, 7), (3, 8))]
    assert (median_of(runs).ttft_p50_s, median_of(runs).ttft_p99_s) == (2, 8)


def test_who_failed_counts_as_a_time_of_infinity():
    request = SimRequest(0, 0.0, "local", "t", 0, 32, 3, 9, ())
    served = Served(0.0, 0.1, 0.1, 0.5, 0.9, 3, 16, 0, False)
    lost = replace(served, first_token_s=None, output_tokens=0, failure="lost")
    found = real_times([request, request], [served, lost], busy_s=[0.45, 0.9])
    assert found.ttft_p50_s == 0.5 and found.ttft_p99_s == math.inf
    assert found.output_tokens_per_s == pytest.approx(3 / 0.9)
    assert found.tpot_p50_ms == pytest.approx(200.0)
    assert found.hit_share == 0.25 and found.busy_share == pytest.approx(0.75)


# ---- the pace of a simulated machine ------------------------------------------------------------


def test_a_step_takes_as_long_as_the_machine_then_needs_for_its_work():
    """Half as fast for the first 2 s, then as foretold for 1 s, and so on."""
    pace = Pace([(1.0, 0.5), (1.0, 0.5), (1.0, 1.0)])
    assert pace.end_of(0.0, 0.25) == pytest.approx(0.5)
    assert pace.end_of(1.5, 0.75) == pytest.approx(2.5)  # a quarter slowly, then half a second
    assert pace.end_of(2.5, 0.5 + 0.5) == pytest.approx(4.0)
    assert pace.end_of(5.0, 2 * 2.0) == pytest.approx(5.0 + 2 * 3.0)


@pytest.mark.parametrize("work_s", [0.001, 0.4, 7.0])
def test_work_in_two_parts_ends_when_it_ends_in_one(work_s):
    pace = Pace([(0.3, 0.1), (0.2, 0.4), (1.0, 0.7)])
    for start_s in (0.0, 0.29, 1.4999, 1.5, 123.4):
        half = pace.end_of(start_s, work_s / 2)
        assert pace.end_of(half, work_s / 2) == pytest.approx(pace.end_of(start_s, work_s))


def test_an_even_pace_changes_nothing_and_one_of_half_doubles_every_step():
    requests = poisson(replace(PLAN, num_requests=12), BLOCK, 0).requests
    alone = [replace(request, arrival_s=100.0 * request.number) for request in requests]
    plain, even, half = (
        simulate(setup_of(pace=pace), alone, searoom) for pace in ((), ((1.0, 1.0),), ((1.0, 0.5),))
    )
    assert even.e2e_s == pytest.approx(plain.e2e_s)
    assert half.busy_s == pytest.approx(2 * plain.busy_s)
    assert simulated_times(alone, half).tpot_p50_ms == pytest.approx(
        2 * simulated_times(alone, plain).tpot_p50_ms
    )


# ---- the protocol -----------------------------------------------------------------------------


def test_calls_through_a_pipe_are_begun_in_order_and_each_gets_its_own_answer():
    async def exchange():
        begun = []

        async def slow_first(method, payload):
            begun.append(payload)
            await asyncio.sleep(0.02 if payload == b"0" else 0.0)
            return payload * 2

        async def nothing(method, payload):
            return b""

        ends = multiprocessing.Pipe()
        asking, answering = Pipe(ends[0], "other", nothing), Pipe(ends[1], "one", slow_first)
        replies = await asyncio.gather(*(asking.call("double", b"%d" % n) for n in range(4)))
        asking.close()
        await asyncio.wait_for(answering.closed.wait(), 1)
        return begun, replies

    begun, replies = asyncio.run(exchange())
    assert begun == [b"0", b"1", b"2", b"3"]
    assert replies == [b"00", b"11", b"22", b"33"]


def test_an_answer_that_fails_closes_the_pipe_and_its_caller_is_told():
    async def exchange():
        async def fails(method, payload):
            raise KeyError(method)

        ends = multiprocessing.Pipe()
        asking, answering = Pipe(ends[0], "other", fails), Pipe(ends[1], "one", fails)
        with pytest.raises(ReplicaGone):
            await asyncio.wait_for(asking.call("whatever"), 1)
        with pytest.raises(ReplicaGone):
            asking.tell("more", b"")
        return answering.failure

    assert isinstance(asyncio.run(exchange()), KeyError)


def test_a_process_that_dies_while_loading_is_an_error_and_not_a_wait():
    async def start():
        async with started(OPTIONS, fake_replica.dies):
            pytest.fail("it was ready")

    with pytest.raises(ReplicaGone):
        asyncio.run(asyncio.wait_for(start(), 60))


def test_the_real_engine_serves_the_simulated_lengths_and_finds_the_simulated_blocks():
    """One replica, one request at a time: hits and tokens are then no matter of timing."""

    async def serve(requests):
        async with fake_replica.in_threads(OPTIONS[:1], base_ms=0.5, per_token_ms=0.0) as replicas:
            await replicas.renew()
            facts = replicas.facts["replica-0"]
            served = await play(replicas, searoom(0, setup_of()), real_requests(requests, facts, BLOCK))
            learned = await replicas.renew()
        return served, learned["replica-0"]

    drawn = poisson(replace(PLAN, num_requests=16), BLOCK, seed=2).requests
    requests = [replace(request, arrival_s=0.25 * request.number) for request in drawn]
    served, learned = asyncio.run(serve(requests))
    alone = [replace(request, arrival_s=100.0 * request.number) for request in requests]
    simulated = simulate(setup_of(), alone, searoom)
    assert [one.failure for one in served] == [None] * 16
    assert [one.output_tokens for one in served] == simulated.output_tokens.tolist()
    assert [one.cached_tokens for one in served] == simulated.cached_tokens.tolist()
    assert sum(one.cached_tokens for one in served) > 0
    assert sum(step.tokens for step in learned.steps) == sum(
        request.prompt_tokens + request.output_tokens - 1 - one.cached_tokens
        for request, one in zip(requests, served, strict=True)
    )


def test_a_calibration_goes_from_rehearsal_to_table(tmp_path):
    """All of it on engines that wait: whoever serves all tokens and foretells its steps has figures."""
    plan = CalibrationPlan(
        OPTIONS, replace(PLAN, num_requests=30), load=0.3, rehearsal_s=1.0, widths=(2, 4), num_simulations=2
    )
    told = []
    fleet = fake_replica.in_threads(OPTIONS, base_ms=5.0, per_token_ms=0.2)
    found = asyncio.run(measure(plan, fleet, told.append, lambda done, total: told.append((done, total))))
    assert told[-2] == (30, 30)
    assert not found.failures and len(found.verdicts) == 3
    assert [steps.name for steps in found.replicas] == ["replica-0", "replica-1"]
    assert all(steps.num_run > 0 and steps.step.base_ms > 0 for steps in found.replicas)
    assert 0 < found.real.hit_share < 1 and 0 < found.simulated.hit_share < 1
    write_json(found, tmp_path / "found.json")
    assert msgspec.json.decode((tmp_path / "found.json").read_bytes(), type=type(found)) == found
    text = io.StringIO()
    print_calibration(found, Console(file=text, width=160))
    assert "ttft p99 s" in text.getvalue() and "replica-1" in text.getvalue()
