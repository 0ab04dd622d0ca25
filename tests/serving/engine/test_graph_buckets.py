"""Decode steps in their buckets: nothing is lost, and padding is nobody's."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.attention_worklist import SPLIT_TOKENS, GpuAttentionBatch
from serving.engine.graph_buckets import (
    Bucket,
    DeviceStep,
    StepLimits,
    bucket_for,
    device_step,
    graph_layout,
    pack,
    pad,
)
from serving.engine.plan import SamplingBatch
from tests.serving.engine.step_plans import Span, greedy, step_plan

BLOCK_TOKENS = 16
NOTHING = np.empty(0, dtype=np.int32)
LIMITS = StepLimits(max_num_seqs=48, max_context_tokens=5000, num_blocks=400, block_tokens=BLOCK_TOKENS)


def random_sampling(rows: int, random: np.random.Generator) -> SamplingBatch:
    return SamplingBatch(
        temperature=random.random(rows, dtype=np.float32),
        top_k=random.integers(0, 100, rows, dtype=np.int32),
        top_p=random.random(rows, dtype=np.float32),
        min_p=random.random(rows, dtype=np.float32),
        seed=random.integers(0, 2**64, rows, dtype=np.uint64),
        position=random.integers(0, 5000, rows, dtype=np.int32),
    )


def decode_step(contexts: list[int], seed: int = 0, *, shared: bool = False) -> DeviceStep:
    """Sequences that decode at the end of these contexts, in blocks of their own unless `shared`."""
    random = np.random.default_rng(seed)
    free = iter(random.permutation(LIMITS.num_blocks).tolist())
    counts = [-(-context // BLOCK_TOKENS) for context in contexts]
    tables = [list(range(n)) if shared else [next(free) for _ in range(n)] for n in counts]
    spans = [Span([7], context - 1, table) for context, table in zip(contexts, tables, strict=True)]
    return device_step(step_plan(spans, BLOCK_TOKENS), random_sampling(len(spans), random), NOTHING, LIMITS)


STEPS = st.builds(
    decode_step,
    st.lists(st.integers(1, 1500), min_size=1, max_size=48).filter(lambda all: sum(all) < 5500),
    st.integers(0, 9),
)


@pytest.mark.parametrize(
    "contexts,rows,table_blocks",
    [([1], 1, 64), ([1] * 3, 4, 64), ([1] * 32, 32, 64), ([1] * 33, 48, 64), ([1024], 1, 64),
     ([1025], 1, 256), ([4096, 1], 2, 256), ([4097], 1, 313), ([5000], 1, 313)],
)  # fmt: skip
def test_the_smallest_bucket_that_holds_a_step(contexts, rows, table_blocks):
    """Rows are powers of two and the most there can be; tables grow fourfold up to the longest context."""
    assert bucket_for(decode_step(contexts), LIMITS) == Bucket(rows, table_blocks, "sampled")


def test_what_is_no_decode_runs_eagerly():
    """A chunk of several tokens, and more rows than sequences are served, have no bucket."""
    for spans in ([Span([1, 2], 0, [3]), Span([1], 5, [4])], [Span([1], 0, [3])] * 49):
        plan = step_plan(spans, BLOCK_TOKENS)
        step = device_step(plan, greedy(len(spans)), np.zeros(len(spans), np.int32), LIMITS)
        assert bucket_for(step, LIMITS) is None


def test_a_shared_prefix_may_be_more_work_than_a_graph_has_room_for():
    """Sequences that share blocks may have more context than the pool has tokens: at some point that runs
    eagerly."""
    limits = replace(LIMITS, max_num_seqs=1024)
    assert bucket_for(decode_step([5000] * 700, shared=True), limits) == Bucket(1024, 313, "sampled")
    assert bucket_for(decode_step([5000] * 900, shared=True), limits) is None


@settings(max_examples=60, deadline=None)
@given(step=STEPS)
def test_every_step_fits_its_bucket_and_comes_back_whole(step):
    """What is laid out for a graph reads back as the step, then dummies of one token in the dummy block."""
    bucket = bucket_for(step, LIMITS)
    padded = pad(step, bucket, LIMITS)
    attention, layout = pack(padded, graph_layout(bucket, LIMITS))
    array = np.full(layout.ints, -77, dtype=np.int32)
    layout.write(array, attention, padded)
    places = [array[place] for place in layout.places()]
    batch = GpuAttentionBatch.view(torch.from_numpy(places[0]), layout.attention)

    live, dummies = len(step.plan.token_ids), slice(len(step.plan.token_ids), None)
    assert bucket.rows < 2 * live or bucket.rows == 1
    used = step.plan.block_tables.shape[1]
    for got, given_ in (
        (places[1], step.plan.token_ids),
        (places[2], step.plan.positions),
        (places[4].view(np.float32), step.sampling.temperature),
        (places[5], step.sampling.top_k),
        (places[6].view(np.float32), step.sampling.top_p),
        (places[7].view(np.float32), step.sampling.min_p),
        (places[8], step.sampling.position),
        (places[9].view(np.uint64), step.sampling.seed),
        (batch.slots.numpy(), step.plan.slot_mapping),
        (batch.context_lens.numpy(), step.plan.context_lens),
        (batch.block_tables.numpy()[:, :used], step.plan.block_tables),
    ):
        assert np.array_equal(got[:live], given_)
    assert (batch.context_lens[dummies] == 1).all() and (places[2][dummies] == 0).all()
    assert (batch.slots[dummies] == LIMITS.num_blocks * BLOCK_TOKENS).all()
    assert (batch.block_tables[dummies, 0] == LIMITS.num_blocks).all()
    assert (places[4][dummies] == 0).all(), "greedy"
    assert np.array_equal(places[3], np.arange(bucket.rows))
    assert batch.counts[1] == sum(-(-c // SPLIT_TOKENS) for c in batch.context_lens.tolist())


def test_a_row_that_wants_no_token_draws_for_nobody():
    """A prompt's chunk may be of one token, and want none: its row draws greedily, and is not looked at."""
    plan = step_plan([Span([1], 4, [3]), Span([2], 6, [5]), Span([3], 0, [8])], BLOCK_TOKENS)
    rows = np.array([0, 2], dtype=np.int32)
    sampling = random_sampling(2, np.random.default_rng(1))
    step = device_step(replace(plan, logits_rows=rows), sampling, NOTHING, LIMITS)
    padded = pad(step, bucket_for(step, LIMITS), LIMITS)
    assert padded.sampling.seed[[0, 2]].tolist() == sampling.seed.tolist()
    assert padded.sampling.temperature[[1, 3]].tolist() == [0, 0]


def test_tokens_that_are_not_known_yet_are_told_by_where_they_lie():
    """The i-th token of the step before lies where that step left it; known ids, and the plan, stay."""
    plan = step_plan([Span([-2], 4, [3]), Span([7], 6, [5]), Span([-1], 2, [8])], BLOCK_TOKENS)
    drawn_rows = np.array([0, 3, 4], dtype=np.int32)
    step = device_step(plan, random_sampling(3, np.random.default_rng(1)), drawn_rows, LIMITS)
    assert step.plan.token_ids.tolist() == [-1 - 3, 7, -1 - 0]
    assert plan.token_ids.tolist() == [-2, 7, -1]
