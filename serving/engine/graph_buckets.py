"""Which CUDA graph a decode step is replayed from, how it is padded to it, and what is copied there. Pure.

    T tokens of the step, B sequences, M widest block table, S rows whose tokens are drawn

A graph is captured for a *bucket*: so many rows, a block table so wide. A step of fewer rows is padded by
dummy sequences of one token each, which write to and read from the dummy block, the one after the pool's;
so every row of a graph has real work, and none of it touches a live sequence:

    rows      [ a ][ b ][ c ][ - ]        three sequences in a bucket of four
    context   [ 9 ][ 70][ 1 ][ 1 ]
    block 0   [ 4 ][ 0 ][ 2 ][ N ]        N blocks in the pool, so block N is nobody's

A step travels as one int32 array (`StepLayout`): the attention kernels' part, tokens, then what the sampler
wants to know. A token id below zero stands for a token that the host does not know yet: -1 - r for what the
step before has left in row r of its drawn tokens.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from kernels.attention_worklist import SPLIT_TOKENS, BatchCapacity, pack_attention
from serving.engine.kv_sizing import step_peak_bytes
from serving.engine.plan import Ints, SamplingBatch, StepPlan
from serving.model_spec import ModelSpec

Draw = Literal["nothing", "greedy", "sampled"]
Scalar = TypeVar("Scalar", bound=np.generic)

# Contexts grow, and a graph cannot: widths are few, and a table is at most so many times too wide.
_NARROWEST_TABLE = 64
_TABLE_STEP = 4
# Parts of the result in float32, [H, D] each: 128 MiB with 32 heads of 128.
_ALWAYS_SPLITS = 8192
# What the driver keeps of launches, for all graphs: assumed, not measured.
_LAUNCHES_BYTES = 256 << 20
_ALIGNED_INTS = 4  # parts start at 16 bytes, as the attention's do


@dataclass(frozen=True, slots=True)
class StepLimits:
    """What a rank's steps stay within; `num_blocks` is the pool, to which the dummy block is added."""

    max_num_seqs: int
    max_context_tokens: int
    num_blocks: int
    block_tokens: int

    @property
    def dummy_block(self) -> int:
        return self.num_blocks

    @property
    def max_table_blocks(self) -> int:
        return min(-(-self.max_context_tokens // self.block_tokens), self.num_blocks)

    def row_buckets(self) -> tuple[int, ...]:
        """1, 2, 4, ... `max_num_seqs`: less than half of a step is padding."""
        return _ladder(1, 2, self.max_num_seqs)

    def table_buckets(self) -> tuple[int, ...]:
        """Widths in blocks, up to that of the longest context."""
        return _ladder(_NARROWEST_TABLE, _TABLE_STEP, self.max_table_blocks)


@dataclass(frozen=True, slots=True)
class Bucket:
    """What a graph is captured for."""

    rows: int
    table_blocks: int
    draw: Draw


@dataclass(frozen=True, slots=True)
class DeviceStep:
    """A step as it is copied to the device."""

    plan: StepPlan
    sampling: SamplingBatch

    @property
    def draw(self) -> Draw:
        if len(self.plan.logits_rows) == 0:
            return "nothing"
        return "sampled" if (self.sampling.temperature > 0).any() else "greedy"


@dataclass(frozen=True, slots=True)
class StepLayout:
    """Where a step's parts lie in its array."""

    attention: BatchCapacity
    rows: int  # S

    @property
    def ints(self) -> int:
        """Length of the array."""
        return self.places()[-1].stop

    def places(self) -> list[slice]:
        """Of the attention's array, token ids, positions and logits rows; then of temperature, top-k, top-p,
        min-p, position and seed (two ints each) of the rows that draw."""
        return _places(self)

    def write(self, array: Ints, attention: Ints, step: DeviceStep) -> None:
        """Lay `step` out in `array` [ints]; `attention` is its part that `pack_attention` made."""
        plan, sampling = step.plan, step.sampling
        parts: tuple[NDArray[Any], ...] = (
            attention,
            plan.token_ids,
            plan.positions,
            plan.logits_rows,
            sampling.temperature,
            sampling.top_k,
            sampling.top_p,
            sampling.min_p,
            sampling.position,
            sampling.seed,
        )
        for place, part in zip(self.places(), parts, strict=True):
            array[place] = part.view(np.int32)


@functools.lru_cache(maxsize=256)  # a graph's comes again and again, an eager step's hardly
def _places(layout: StepLayout) -> list[slice]:
    tokens, rows = layout.attention.tokens, layout.rows
    sizes = (layout.attention.ints, tokens, tokens, *[rows] * 6, 2 * rows)
    aligned = (-(-size // _ALIGNED_INTS) * _ALIGNED_INTS for size in sizes)
    starts = itertools.accumulate(aligned, initial=0)
    return [slice(start, start + size) for start, size in zip(starts, sizes, strict=False)]


def device_step(plan: StepPlan, sampling: SamplingBatch, drawn_rows: Ints, limits: StepLimits) -> DeviceStep:
    """`plan` with block tables as wide as its contexts are (sequences may hold more blocks), and with the
    places of tokens that are not known yet: the i-th one lies in `drawn_rows[i]` of what was drawn.
    """
    used = -(-int(plan.context_lens.max()) // limits.block_tokens)
    token_ids, unknown = plan.token_ids, plan.token_ids < 0
    if unknown.any():
        token_ids = token_ids.copy()
        token_ids[unknown] = -1 - drawn_rows[-1 - token_ids[unknown]]
    plan = replace(plan, token_ids=token_ids, block_tables=plan.block_tables[:, :used])
    return DeviceStep(plan, sampling)


def pack(step: DeviceStep, layout: StepLayout | None = None) -> tuple[Ints, StepLayout]:
    """The attention's part of `step`, and the step's layout: the one given, or one that fits exactly.

    Raises ValueError where the step does not fit.
    """
    plan = step.plan
    capacity = None if layout is None else layout.attention
    attention, capacity = pack_attention(
        plan.slot_mapping, plan.query_start, plan.context_lens, plan.block_tables, capacity
    )
    return attention, layout or StepLayout(capacity, len(plan.logits_rows))


@functools.cache
def graph_layout(bucket: Bucket, limits: StepLimits) -> StepLayout:
    """The layout of every step of `bucket`.

    A split costs a graph memory for its part of the result, so there is room for what the pool's tokens
    make, and one a sequence, or for `_ALWAYS_SPLITS` where that is more: sequences share prefixes.
    """
    splits = -(-bucket.table_blocks * limits.block_tokens // SPLIT_TOKENS)
    in_pool = bucket.rows + limits.num_blocks * limits.block_tokens // SPLIT_TOKENS
    capacity = BatchCapacity(
        tokens=bucket.rows,
        sequences=bucket.rows,
        table_blocks=bucket.table_blocks,
        prefill_items=0,
        decode_items=min(bucket.rows * splits, max(in_pool, _ALWAYS_SPLITS)),
        merges=bucket.rows if splits > 1 else 0,
    )
    return StepLayout(capacity, 0 if bucket.draw == "nothing" else bucket.rows)


def bucket_for(step: DeviceStep, limits: StepLimits) -> Bucket | None:
    """The smallest bucket that holds `step`; None where it must run eagerly.

    That is where a sequence has several new tokens, and where so many share a long prefix that their
    splits are more than a graph has room for.
    """
    num_tokens, num_seqs, used = len(step.plan.token_ids), *step.plan.block_tables.shape
    if num_tokens != num_seqs or num_seqs > limits.max_num_seqs or used > limits.max_table_blocks:
        return None
    rows = next(size for size in limits.row_buckets() if size >= num_seqs)
    table_blocks = next(size for size in limits.table_buckets() if size >= used)
    bucket = Bucket(rows, table_blocks, step.draw)
    splits = int((-(-step.plan.context_lens // SPLIT_TOKENS)).sum()) + rows - num_seqs
    return bucket if splits <= graph_layout(bucket, limits).attention.decode_items else None


def pad(step: DeviceStep, bucket: Bucket, limits: StepLimits) -> DeviceStep:
    """`step`, of one new token a sequence, with `bucket`'s rows; all of them draw, if any does."""
    plan, sampling = step.plan, step.sampling
    dummies = bucket.rows - len(plan.token_ids)
    drawing = 0 if bucket.draw == "nothing" else bucket.rows
    tables = np.zeros((bucket.rows, bucket.table_blocks), dtype=np.int32)
    tables[: len(plan.block_tables), : plan.block_tables.shape[1]] = plan.block_tables
    tables[len(plan.block_tables) :, 0] = limits.dummy_block
    padded = StepPlan(
        token_ids=_extended(plan.token_ids, dummies, 0),
        positions=_extended(plan.positions, dummies, 0),
        slot_mapping=_extended(plan.slot_mapping, dummies, limits.dummy_block * limits.block_tokens),
        query_start=np.arange(bucket.rows + 1, dtype=np.int32),
        context_lens=_extended(plan.context_lens, dummies, 1),
        block_tables=tables,
        logits_rows=np.arange(drawing, dtype=np.int32),
    )
    rows = plan.logits_rows
    spread = SamplingBatch(
        temperature=_spread(sampling.temperature, rows, drawing, 0),
        top_k=_spread(sampling.top_k, rows, drawing, 0),
        top_p=_spread(sampling.top_p, rows, drawing, 1),
        min_p=_spread(sampling.min_p, rows, drawing, 0),
        seed=_spread(sampling.seed, rows, drawing, 0),
        position=_spread(sampling.position, rows, drawing, 0),
    )
    return DeviceStep(padded, spread)


def graphs_bytes(spec: ModelSpec, max_num_seqs: int, block_bytes: int) -> int:
    """Memory to keep for a rank's graphs and the dummy block.

    Graphs share what they compute in, but one that needs more than those before adds to it: buckets that
    double come to twice the largest at most.
    """
    activations, logits = step_peak_bytes(spec, max_num_seqs, max_num_seqs)
    split_results = _ALWAYS_SPLITS * spec.num_heads * (spec.head_dim + 1) * 4
    return 2 * (activations + logits) + split_results + _LAUNCHES_BYTES + block_bytes


@functools.cache
def _ladder(first: int, factor: int, last: int) -> tuple[int, ...]:
    steps = itertools.takewhile(lambda size: size < last, (first * factor**i for i in itertools.count()))
    return (*steps, last)


def _extended(values: Ints, count: int, filler: int) -> Ints:
    return np.append(values, np.full(count, filler, dtype=np.int32))


def _spread(values: NDArray[Scalar], rows: Ints, size: int, filler: int) -> NDArray[Scalar]:
    spread = np.full(size, filler, dtype=values.dtype)
    spread[rows] = values
    return spread
