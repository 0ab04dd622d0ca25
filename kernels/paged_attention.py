"""Causal attention over a paged KV cache, for a mixed batch of prefill chunks and decodes.

    out_t = softmax_{j <= p_t}(q_t . k_j / sqrt(D)) v_j                (Vaswani et al. 2017, eq. 1)

where j runs over the positions of t's own sequence. G query heads share a key/value head
(Ainslie et al. 2023). A layer's cache is `[2, N, K, block_tokens, D]`, keys first, in the queries'
dtype or a narrower one: N blocks that
sequences own through block tables (Kwon et al. 2023). Within a block a head's positions are
adjacent, so that gathering (block, head) rows yields contiguous heads.

The torch path gathers each sequence's blocks and calls torch's scaled_dot_product_attention: one
call a prefill chunk, one call a *group* of decodes of similar length. Slots past a sequence's
context may hold anything, NaN of a broken neighbour included. A mask alone would not keep NaN out
(0 * NaN), so a shorter sequence is padded with its own first block, and the rest of its last block
is zeroed after the gather. The GPU's kernels (`kernels.gpu.paged_attention`) take their own metadata, which
`kernels.attention_worklist` describes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from kernels.attention_worklist import GpuAttentionBatch
from kernels.dispatch import choose

Ints = NDArray[np.int32]

# A group's gathered keys and values stay in a CPU's last-level cache, and its memory is bounded.
_GROUP_TOKENS = 16_384
# Longest to shortest context in a group: what padding may waste.
_GROUP_STRETCH = 1.5
# Entries of a prefill mask; a longer chunk behind a long context is attended to in tiles of rows.
_MASK_ENTRIES = 1 << 22


@dataclass(frozen=True, slots=True, eq=False)
class DecodeGroup:
    """n sequences of one new token each, padded to L positions (a whole number of blocks)."""

    rows: torch.Tensor  # [n] rows of the T tokens
    parts: torch.Tensor  # [2 * n * K * L / block_tokens] (block, head) rows of the cache, keys first
    tails: torch.Tensor  # rows of the gathered [2 * n * K * L] in the unwritten rest of last blocks
    mask: torch.Tensor  # [n, 1, 1, L] 0 or -inf, in the queries' dtype
    contexts: torch.Tensor  # [n, 1, 1, 1] positions that a sequence has

    def mask_within(self, window: int | None) -> torch.Tensor:
        """The mask of a layer that sees the last `window` positions."""
        if window is None or window >= self.mask.shape[-1]:
            return self.mask
        at = torch.arange(self.mask.shape[-1], device=self.mask.device)
        return self.mask.masked_fill(at < self.contexts - window, float("-inf"))


@dataclass(frozen=True, slots=True, eq=False)
class PrefillChunk:
    """Consecutive tokens of one sequence, with the context that the last of them sees."""

    start: int
    end: int
    context_tokens: int
    parts: torch.Tensor  # [2 * K * blocks of the context], as in DecodeGroup
    mask: torch.Tensor | None  # [end - start, context] 0 or -inf; None where plain causal

    def mask_within(self, window: int | None) -> torch.Tensor | None:
        """The mask of a layer that sees the last `window` positions; of bool where the window hides any."""
        if window is None or window >= self.context_tokens:
            return self.mask
        own = self.context_tokens - (self.end - self.start)  # the position of the chunk's first token
        shape = (self.end - self.start, self.context_tokens)
        seen = torch.ones(shape, dtype=torch.bool, device=self.parts.device)
        return seen.tril_(own).triu_(own - window + 1)


@dataclass(frozen=True, slots=True, eq=False)
class TorchAttentionBatch:
    """What the torch path needs of a step."""

    slots: torch.Tensor  # [T * K] (block, head, offset) rows that the tokens' keys and values go to
    decodes: tuple[DecodeGroup, ...]
    prefills: tuple[PrefillChunk, ...]


# A step's attention metadata, made once and used by every layer.
AttentionBatch = TorchAttentionBatch | GpuAttentionBatch


def plan_attention(
    slot_mapping: Ints,
    query_start: Ints,
    context_lens: Ints,
    block_tables: Ints,
    *,
    cache: torch.Tensor,
    dtype: torch.dtype,
) -> AttentionBatch:
    """The metadata of a step; arrays as in `serving.engine.plan.StepPlan`, `cache` any layer's."""
    plan = choose(cache, _plan_torch, "kernels.attention_worklist:plan_gpu_attention")
    return plan(slot_mapping, query_start, context_lens, block_tables, cache=cache, dtype=dtype)


def write_kv(cache: torch.Tensor, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor) -> None:
    """Store key and value [T, K, D] in one layer's cache, at the batch's `slots`."""
    choose(cache, _write_kv_torch, "kernels.attention_worklist:write_kv_by_slot")(cache, key, value, slots)


def paged_attention(
    query: torch.Tensor,
    cache: torch.Tensor,
    batch: AttentionBatch,
    *,
    window: int | None = None,
    key_scale: float = 1.0,
    value_scale: float = 1.0,
) -> torch.Tensor:
    """query [T, H, D] over one layer's cache -> [T, H, D]; the step's own keys are already written.

    A token sees the last `window` positions up to its own, or all; what the cache holds, times the two
    scales, are the keys and values. Raises ValueError where the path has not what is asked.
    """
    attend = choose(query, _paged_attention_torch, "kernels.gpu.paged_attention:paged_attention")
    return attend(query, cache, batch, window=window, key_scale=key_scale, value_scale=value_scale)


def _plan_torch(
    slot_mapping: Ints,
    query_start: Ints,
    context_lens: Ints,
    block_tables: Ints,
    *,
    cache: torch.Tensor,
    dtype: torch.dtype,
) -> TorchAttentionBatch:
    query_lens = np.diff(query_start)
    decodes = [
        _decode_group(query_start[members], context_lens[members], block_tables[members], cache, dtype)
        for members in _group_by_length(np.flatnonzero(query_lens == 1), context_lens)
    ]
    prefills = [
        _prefill_chunk(start, end, context, block_tables[b], cache, dtype)
        for b in np.flatnonzero(query_lens > 1)
        for start, end, context in _tiles(int(query_start[b]), int(query_start[b + 1]), int(context_lens[b]))
    ]
    slots = torch.from_numpy(_slot_rows(slot_mapping, cache))
    return _to_device(TorchAttentionBatch(slots, tuple(decodes), tuple(prefills)), cache.device)


def paged_attention_reference(
    query: torch.Tensor,
    cache: torch.Tensor,
    query_start: Ints,
    context_lens: Ints,
    block_tables: Ints,
    window: int | None = None,
) -> torch.Tensor:
    """The formula, one token and one head at a time, in float64."""
    out = torch.empty_like(query)
    num_kv_heads, block_tokens = cache.shape[2:4]
    group = query.shape[1] // num_kv_heads
    for b, context in enumerate(context_lens.tolist()):
        start, end = int(query_start[b]), int(query_start[b + 1])
        for t in range(start, end):
            after = context - (end - start) + (t - start) + 1
            seen = np.arange(max(0, after - window) if window else 0, after)
            block = torch.from_numpy(block_tables[b, seen // block_tokens]).long()
            at = torch.from_numpy(seen % block_tokens)
            for h in range(query.shape[1]):
                keys, values = cache[:, block, h // group, at].double()
                scores = keys @ query[t, h].double() / query.shape[2] ** 0.5
                out[t, h] = (scores.softmax(dim=0) @ values).to(query.dtype)
    return out


def _write_kv_torch(cache: torch.Tensor, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor) -> None:
    keys, values = _bits(cache.flatten(1, 3))
    keys.index_copy_(0, slots, _bits(key.flatten(0, 1).to(cache.dtype)))
    values.index_copy_(0, slots, _bits(value.flatten(0, 1).to(cache.dtype)))


def _bits(x: torch.Tensor) -> torch.Tensor:
    """x; e4m3 as its bytes, because torch copies those by index on any device."""
    return x.view(torch.uint8) if x.dtype is torch.float8_e4m3fn else x


def _paged_attention_torch(
    query: torch.Tensor,
    cache: torch.Tensor,
    batch: AttentionBatch,
    *,
    window: int | None,
    key_scale: float,
    value_scale: float,
) -> torch.Tensor:
    assert isinstance(batch, TorchAttentionBatch), "planned for the GPU kernels"
    if (key_scale, value_scale) != (1.0, 1.0):
        raise ValueError("scaled caches need the GPU kernels")
    out = torch.empty_like(query)
    for chunk in batch.prefills:
        out[chunk.start : chunk.end] = _attend_chunk(query[chunk.start : chunk.end], cache, chunk, window)
    for group in batch.decodes:
        out.index_copy_(0, group.rows, _attend_group(query.index_select(0, group.rows), cache, group, window))
    return out


def _attend_chunk(
    query: torch.Tensor, cache: torch.Tensor, chunk: PrefillChunk, window: int | None
) -> torch.Tensor:
    tokens, num_heads, head_dim = query.shape
    num_kv_heads = cache.shape[2]
    group = num_heads // num_kv_heads
    gathered = _gather(cache, chunk.parts).to(query.dtype).view(2, num_kv_heads, 1, -1, head_dim)
    # The batch dimension is K and the head dimension G: keys are shared by a zero stride, not copied.
    keys, values = gathered[:, :, :, : chunk.context_tokens].expand(-1, -1, group, -1, -1)
    grouped = query.unflatten(1, (num_kv_heads, group)).permute(1, 2, 0, 3)
    mask = chunk.mask_within(window)
    out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, is_causal=mask is None)
    return out.permute(2, 0, 1, 3).reshape(tokens, num_heads, head_dim)


def _attend_group(
    query: torch.Tensor, cache: torch.Tensor, group: DecodeGroup, window: int | None
) -> torch.Tensor:
    n, num_heads, head_dim = query.shape
    num_kv_heads = cache.shape[2]
    gathered = _gather(cache, group.parts).to(query.dtype).view(-1, head_dim)
    gathered.index_fill_(0, group.tails, 0)
    keys, values = gathered.view(2, n, num_kv_heads, -1, head_dim)
    # The G heads that share keys become G queries of one head: a small product instead of G vectors.
    grouped = query.unflatten(1, (num_kv_heads, -1))
    mask = group.mask_within(window).expand(-1, -1, grouped.shape[2], -1)
    out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask)
    return out.reshape(n, num_heads, head_dim)


def _gather(cache: torch.Tensor, parts: torch.Tensor) -> torch.Tensor:
    return cache.view(2 * cache.shape[1] * cache.shape[2], -1).index_select(0, parts)


def _group_by_length(members: NDArray[np.intp], context_lens: Ints) -> list[NDArray[np.intp]]:
    """`members` in groups of similar context, each within the two limits at the top of this file."""
    groups: list[NDArray[np.intp]] = []
    rest = members[np.argsort(-context_lens[members], kind="stable")]
    while len(rest):
        longest = int(context_lens[rest[0]])
        near = int(np.count_nonzero(context_lens[rest] * _GROUP_STRETCH >= longest))
        size = max(1, min(near, _GROUP_TOKENS // longest))
        groups.append(rest[:size])
        rest = rest[size:]
    return groups


def _tiles(start: int, end: int, context: int) -> list[tuple[int, int, int]]:
    """A chunk's rows cut so that no tile's mask is too large, each as (start, end, its context)."""
    if end - start == context:
        return [(start, end, context)]
    rows = max(1, _MASK_ENTRIES // context)
    starts = range(start, end, rows)
    return [(at, min(at + rows, end), context - end + min(at + rows, end)) for at in starts]


def _decode_group(
    rows: Ints, context_lens: Ints, block_tables: Ints, cache: torch.Tensor, dtype: torch.dtype
) -> DecodeGroup:
    num_kv_heads, block_tokens = cache.shape[2:4]
    num_blocks = -(-context_lens // block_tokens)
    width = int(num_blocks.max())
    tables = np.where(np.arange(width) < num_blocks[:, None], block_tables[:, :width], block_tables[:, :1])
    at = np.arange(width * block_tokens)
    past = at >= context_lens[:, None]  # [n, L]
    tails = np.flatnonzero(
        np.broadcast_to(
            (past & (at < num_blocks[:, None] * block_tokens))[:, None],
            (2, len(rows), num_kv_heads, len(at)),
        )
    )
    mask = torch.zeros(past.shape, dtype=dtype).masked_fill_(torch.from_numpy(past), float("-inf"))
    return DecodeGroup(
        rows=torch.from_numpy(rows.astype(np.int64)),
        parts=_cache_parts(tables, cache),
        tails=torch.from_numpy(tails),
        mask=mask[:, None, None],
        contexts=torch.from_numpy(context_lens.astype(np.int64))[:, None, None, None],
    )


def _prefill_chunk(
    start: int, end: int, context: int, block_table: Ints, cache: torch.Tensor, dtype: torch.dtype
) -> PrefillChunk:
    mask = None
    if end - start < context:
        mask = torch.full((end - start, context), float("-inf"), dtype=dtype)
        mask.triu_(diagonal=context - (end - start) + 1)
    used = -(-context // cache.shape[3])
    return PrefillChunk(start, end, context, _cache_parts(block_table[None, :used], cache), mask)


def _cache_parts(block_tables: Ints, cache: torch.Tensor) -> torch.Tensor:
    """(block, head) rows of [n, M] blocks, in the order [keys or values, n, head, M]."""
    num_blocks, num_kv_heads = cache.shape[1:3]
    heads = block_tables[:, None].astype(np.int64) * num_kv_heads + np.arange(num_kv_heads)[:, None]
    return torch.from_numpy(np.stack((heads, heads + num_blocks * num_kv_heads)).reshape(-1))


def _slot_rows(slot_mapping: Ints, cache: torch.Tensor) -> NDArray[np.int64]:
    """Rows of the cache as [N * K * block_tokens, D] for each token's K heads."""
    num_kv_heads, block_tokens = cache.shape[2:4]
    block, offset = np.divmod(slot_mapping.astype(np.int64), block_tokens)
    heads = block[:, None] * num_kv_heads + np.arange(num_kv_heads)
    return (heads * block_tokens + offset[:, None]).reshape(-1)


def _to_device(batch: TorchAttentionBatch, device: torch.device) -> TorchAttentionBatch:
    if device.type == "cpu":
        return batch
    return TorchAttentionBatch(
        slots=batch.slots.to(device),
        decodes=tuple(
            DecodeGroup(*(part.to(device) for part in (g.rows, g.parts, g.tails, g.mask, g.contexts)))
            for g in batch.decodes
        ),
        prefills=tuple(
            PrefillChunk(
                c.start,
                c.end,
                c.context_tokens,
                c.parts.to(device),
                None if c.mask is None else c.mask.to(device),
            )
            for c in batch.prefills
        ),
    )
