"""A step's attention metadata for the GPU: one int32 array, so that a step costs one copy.

The kernels learn from device memory what there is to do, never from the host, so that a captured CUDA
graph serves steps of any lengths: a *work item* is a piece of one sequence, and `counts` says how many of
a list's items are real. Three lists, each row of int32:

    prefill_work  (sequence, block)             block: QUERY_BLOCK of the sequence's new tokens
    decode_work   (row, sequence, split, context)   split: SPLIT_TOKENS of the context of a single new token
    merge_work    (row, first item, context)    a decoding row whose splits, consecutive items, are joined

No list depends on the number of query heads or on a window: a kernel finds out what of its item is
empty. SPLIT_TOKENS is a constant of the arithmetic, not a choice of the moment: the order in which a
sequence's terms are added must not depend on what else is in the batch.

Eagerly, `plan_gpu_attention` makes a batch that fits exactly. For a graph, keep one device array of
`capacity.ints`, capture with `GpuAttentionBatch.view(array, capacity)`, and before each replay copy there
what `pack_attention(..., capacity)` returns: launches depend on the capacity alone.
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

Ints = NDArray[np.int32]

SPLIT_TOKENS = 512
QUERY_BLOCK = 128

_ALIGNED_INTS = 4  # parts start at 16 bytes, what Triton compiles aligned pointers for


@dataclass(frozen=True, slots=True)
class BatchCapacity:
    """What a batch's array has room for: T tokens and B sequences exactly, the rest at most."""

    tokens: int
    sequences: int
    table_blocks: int  # M, of the widest block table
    prefill_items: int
    decode_items: int
    merges: int

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of the parts, in the order of `GpuAttentionBatch`'s fields."""
        return (
            (3,),
            (self.tokens,),
            (self.sequences + 1,),
            (self.sequences,),
            (self.sequences, self.table_blocks),
            (self.prefill_items, 2),
            (self.decode_items, 4),
            (self.merges, 3),
        )

    @property
    def ints(self) -> int:
        """Length of the array."""
        return self._starts()[-1]

    def parts(self) -> list[tuple[slice, tuple[int, ...]]]:
        """Where each part lies in the array, and its shape."""
        return _parts(self)

    def _starts(self) -> list[int]:
        aligned = (-(-math.prod(shape) // _ALIGNED_INTS) * _ALIGNED_INTS for shape in self.shapes)
        return list(itertools.accumulate(aligned, initial=0))


@functools.lru_cache(maxsize=256)  # a graph's comes again and again, an eager step's hardly
def _parts(capacity: BatchCapacity) -> list[tuple[slice, tuple[int, ...]]]:
    sizes = (math.prod(shape) for shape in capacity.shapes)
    return [
        (slice(start, start + size), shape)
        for start, size, shape in zip(capacity._starts(), sizes, capacity.shapes, strict=False)
    ]


@dataclass(frozen=True, slots=True, eq=False)
class GpuAttentionBatch:
    """Views of one int32 array on the device; arrays as in `serving.engine.plan.StepPlan`."""

    counts: torch.Tensor  # [3] real items of the lists below
    slots: torch.Tensor  # [T] block * block_tokens + offset that a token's key and value go to
    query_start: torch.Tensor  # [B + 1]
    context_lens: torch.Tensor  # [B]
    block_tables: torch.Tensor  # [B, M]
    prefill_work: torch.Tensor  # [P, 2], the longest first
    decode_work: torch.Tensor  # [W, 4]
    merge_work: torch.Tensor  # [R, 3]

    @classmethod
    def view(cls, array: torch.Tensor, capacity: BatchCapacity) -> GpuAttentionBatch:
        """The batch in `array` [capacity.ints]."""
        return cls(*(array[place].view(shape) for place, shape in capacity.parts()))


def plan_gpu_attention(
    slot_mapping: Ints,
    query_start: Ints,
    context_lens: Ints,
    block_tables: Ints,
    *,
    cache: torch.Tensor,
    dtype: torch.dtype,
) -> GpuAttentionBatch:
    """`kernels.paged_attention.plan_attention` for the Triton kernels; `dtype` makes no difference."""
    array, capacity = pack_attention(slot_mapping, query_start, context_lens, block_tables)
    host = torch.from_numpy(array)
    if cache.is_cuda:
        host = host.pin_memory().to(cache.device, non_blocking=True)
    return GpuAttentionBatch.view(host, capacity)


def write_kv_by_slot(
    cache: torch.Tensor, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor
) -> None:
    """`kernels.paged_attention.write_kv` at `GpuAttentionBatch.slots`, none negative: the unfused way."""
    block_tokens = cache.shape[3]
    block, offset = slots // block_tokens, slots % block_tokens
    cache[0, block, :, offset] = key.to(cache.dtype)
    cache[1, block, :, offset] = value.to(cache.dtype)


def pack_attention(
    slot_mapping: Ints,
    query_start: Ints,
    context_lens: Ints,
    block_tables: Ints,
    capacity: BatchCapacity | None = None,
) -> tuple[Ints, BatchCapacity]:
    """The array [capacity.ints] of a step, and its capacity: the one given, or one that fits exactly.

    Raises ValueError where the step does not fit. Tokens and sequences must be as many as the capacity's:
    a bucket is padded by sequences that decode a dummy block, so that every row has a place to write to.
    """
    query_lens = np.diff(query_start)
    prefill = _prefill_items(query_lens, context_lens)
    decode, merge = _decode_items(query_start, query_lens, context_lens)
    counts = np.array([len(prefill), len(decode), len(merge)], dtype=np.int32)
    tokens, (sequences, width) = len(slot_mapping), block_tables.shape
    needed = BatchCapacity(tokens, sequences, width, *(int(count) for count in counts))
    if capacity is None:
        capacity = needed
    parts = (counts, slot_mapping, query_start, context_lens, block_tables, prefill, decode, merge)
    array = np.zeros(capacity.ints, dtype=np.int32)
    for part, (place, shape) in zip(parts, capacity.parts(), strict=True):
        if part is slot_mapping or part is context_lens:
            fits = part.shape == shape
        else:
            fits = all(size <= room for size, room in zip(part.shape, shape, strict=True))
        if not fits:
            raise ValueError(f"a step of {needed} does not fit {capacity}")
        array[place].reshape(shape)[tuple(slice(size) for size in part.shape)] = part
    return array, capacity


def _prefill_items(query_lens: Ints, context_lens: Ints) -> Ints:
    """[P, 2] blocks of the sequences with several new tokens, those that see most first: they end last."""
    sequences = np.flatnonzero(query_lens > 1)
    member, block = _pieces(query_lens[sequences], QUERY_BLOCK)
    sequence = sequences[member]
    unseen = np.maximum(query_lens[sequence] - (block + 1) * QUERY_BLOCK, 0)
    order = np.argsort(unseen - context_lens[sequence], kind="stable")
    return np.stack((sequence, block), axis=1)[order].astype(np.int32)


def _decode_items(query_start: Ints, query_lens: Ints, context_lens: Ints) -> tuple[Ints, Ints]:
    """[W, 4] splits of the sequences with one new token, and [R, 3] those with several splits."""
    sequences = np.flatnonzero(query_lens == 1)
    contexts = context_lens[sequences]
    rows = query_start[sequences]
    member, split = _pieces(contexts, SPLIT_TOKENS)
    items = np.stack((rows[member], sequences[member], split, contexts[member]), axis=1)
    first = np.searchsorted(member, np.arange(len(sequences)))
    several = contexts > SPLIT_TOKENS
    merges = np.stack((rows, first, contexts), axis=1)[several]
    return items.astype(np.int32), merges.astype(np.int32)


def _pieces(lengths: Ints, size: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Lengths cut in pieces of `size`: of each piece, which length it is of and which of its pieces."""
    counts = -(-lengths // size)
    member = np.repeat(np.arange(len(lengths)), counts)
    return member, np.arange(len(member)) - np.repeat(np.cumsum(counts) - counts, counts)
