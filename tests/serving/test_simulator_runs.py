"""Runs of decode steps taken at once, beside the scheduler's own single steps."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.engine.block_pool import BlockPool
from serving.engine.growth import OutputGrowth
from serving.engine.limits import SchedulerLimits
from serving.engine.step_time import StepShape
from serving.simulator.engine import SimScheduler, SimSequence
from tests.serving.simulator_cases import STEP, a_request

BLOCK_TOKENS = 4
LIMITS = SchedulerLimits(max_num_seqs=8, max_step_tokens=64, max_context_tokens=400)


def one_step(scheduler):
    """A step of the scheduler; returns what it is predicted to take."""
    step = scheduler.schedule(0.0)
    drawn = [chunk.sequence.next_token for chunk in step.chunks if chunk.wants_token]
    shape = StepShape.of(step)
    scheduler.complete(step, np.array(drawn, dtype=np.int32), 0.0)
    return STEP.predict_ms(shape.tokens, shape.kv_tokens, shape.num_logits, shape.attention_pairs)


def story(scheduler):
    """All that a scheduler's future depends on."""
    pool = scheduler.pool
    sequences = [
        (
            s.request_id,
            len(s.token_ids),
            s.num_computed,
            s.num_registered,
            list(s.block_table),
            s.block_hashes,
        )
        for s in scheduler.running
    ]
    blocks = (list(pool._free), list(pool._evictable), pool._hash_of, pool._num_readers)
    return sequences, blocks, pool.events.last_number, scheduler._step_number


def submit(scheduler, number, prompt_tokens, output_tokens, prefix):
    request = a_request(number, 0.0, prompt_tokens, output_tokens, prefix)
    scheduler.reserve(SimSequence.of(request, str(number), 0, None, BLOCK_TOKENS), 0.0)


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(
        st.tuples(st.integers(1, 40), st.integers(1, 60), st.sampled_from([None, 0, 1])),
        min_size=1,
        max_size=12,
    ),
    num_blocks=st.integers(30, 120),
    parts=st.lists(st.integers(1, 9), min_size=1, max_size=5),
)
def test_a_run_leaves_everything_as_its_single_steps_do(sizes, num_blocks, parts):
    """Tokens, blocks, names, free list and LRU order agree at every run's end, cut wherever it is."""
    fast, slow = (SimScheduler(BlockPool(num_blocks, BLOCK_TOKENS), LIMITS) for _ in range(2))
    for number, size in enumerate(sizes):
        for scheduler in (fast, slow):
            submit(scheduler, number, *size)
    turn = 0
    while slow.has_work:
        run = fast.decode_run(0.0, STEP)
        if run is None:
            one_step(fast)
            one_step(slow)
        else:
            num_steps = min(run.num_steps, 2 * parts[turn % len(parts)])
            fast.go_on(run, num_steps // 2)
            fast.go_on(run, num_steps)
            single_ms = sum(one_step(slow) for _ in range(num_steps))
            assert run.time_of(num_steps) * 1e3 == pytest.approx(single_ms, rel=1e-12)
        turn += 1
        assert story(fast) == story(slow)
        fast.check_integrity()
    assert not fast.has_work


def test_steps_by_inverts_time_of():
    """A run's step is done at its own time and not before."""
    scheduler = SimScheduler(BlockPool(64, BLOCK_TOKENS), LIMITS)
    for number in range(3):
        submit(scheduler, number, 10 + number, 50, None)
    one_step(scheduler)
    run = scheduler.decode_run(3.7, STEP)
    assert run.num_steps == 48  # the step of a last token is the scheduler's
    for steps in range(1, run.num_steps + 1):
        at_s = run.time_of(steps)
        assert run.steps_by(at_s) == steps
        assert run.steps_by(np.nextafter(at_s, 0)) == steps - 1
    assert run.steps_by(3.7) == run.steps_by(0.0) == 0
    assert run.steps_by(1e9) == run.num_steps


def test_no_run_while_somebody_may_be_admitted_or_computes_a_prompt():
    """Only what cannot change is foreseen."""
    scheduler = SimScheduler(BlockPool(64, BLOCK_TOKENS), LIMITS)
    submit(scheduler, 0, 100, 50, None)
    assert scheduler.decode_run(0.0, STEP) is None
    one_step(scheduler)  # 64 of its 100 tokens
    assert scheduler.decode_run(0.0, STEP) is None
    one_step(scheduler)
    assert scheduler.decode_run(0.0, STEP) is not None
    submit(scheduler, 1, 10, 50, None)
    assert scheduler.decode_run(0.0, STEP) is None


def test_a_run_ends_before_blocks_are_wanting():
    """Preemption is the scheduler's business: a run takes free blocks and evicts, nothing else."""
    pool = BlockPool(10, BLOCK_TOKENS)
    sanguine = OutputGrowth(pool, LIMITS.max_context_tokens, prior_tokens=1)
    scheduler = SimScheduler(pool, LIMITS, sanguine)
    for number in range(2):
        submit(scheduler, number, 12, 20, None)
    one_step(scheduler)  # 3 blocks each, and 13 tokens: both take a 4th in the next step, and a 5th 4 later
    run = scheduler.decode_run(0.0, STEP)
    assert run.num_steps == 8
    scheduler.go_on(run, 8)
    assert scheduler.pool.num_available == 0
    assert scheduler.decode_run(0.0, STEP) is None
