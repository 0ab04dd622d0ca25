"""Causal attention of a chunk of new tokens over a paged cache, for the tensor cores.

A tile is BLOCK_M rows, a row being one query head of one token: the G heads that share keys lie together,
token by token, so that a short chunk fills a tile and a key is read once for all of them. It runs over its
context BLOCK_N tokens at a time with a running softmax (Dao, 2023: FlashAttention-2, algorithm 1), first
the tokens that all rows see, then, masked, the few that some do:

    positions   0 ........ window's edge ........ first row's position .. last row's position
    loop             masked            unmasked                      masked

The order of a row's terms depends on its own position alone: neither the batch nor the chunks that a
prompt is cut into change a bit of the result. Shape legend in `kernels`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from kernels.attention_worklist import QUERY_BLOCK, GpuAttentionBatch
from kernels.gpu.attention_shapes import INT32_MAX, Case, cases, max_registers, oldest_for, padded
from kernels.gpu.device import capability
from kernels.gpu.variants import Variant


@dataclass(frozen=True)
class PrefillConfig:
    """A tile of `block_m` rows by `block_n` tokens; `block_m` divides QUERY_BLOCK. `programs` share a
    multiprocessor: while one computes a softmax, the other feeds the tensor cores."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    programs: int = 1

    @property
    def max_registers(self) -> int | None:
        """Two programs' share ptxas finds by itself, and with fewer spills than when it is told."""
        return max_registers(1, self.num_warps) if self.programs == 1 else None


# (oldest capability, padded head dim) → config. The accumulator and a tile of logits lie in registers: a
# wider tile than these spills.
_CONFIGS = {
    (80, 64): PrefillConfig(block_m=128, block_n=64, num_warps=8, num_stages=3),
    (80, 128): PrefillConfig(block_m=128, block_n=64, num_warps=8, num_stages=3),
    (80, 256): PrefillConfig(block_m=64, block_n=32, num_warps=8, num_stages=3),
    (90, 64): PrefillConfig(block_m=128, block_n=64, num_warps=8, num_stages=3, programs=2),
    (90, 128): PrefillConfig(block_m=128, block_n=128, num_warps=8, num_stages=3),
    (90, 256): PrefillConfig(block_m=128, block_n=32, num_warps=8, num_stages=5),
}
# e4m3 is widened in registers, which takes more of them.
_NARROW_CONFIGS = {
    **_CONFIGS,
    (90, 64): PrefillConfig(block_m=128, block_n=64, num_warps=8, num_stages=3),
    (90, 128): PrefillConfig(block_m=128, block_n=64, num_warps=8, num_stages=5),
    (90, 256): PrefillConfig(block_m=64, block_n=32, num_warps=8, num_stages=3),
}
# A window's masks take some, too, and its edge wastes less of a narrower tile.
_WINDOW_CONFIGS = {
    **_CONFIGS,
    (90, 128): PrefillConfig(block_m=128, block_n=64, num_warps=8, num_stages=5),
}


def config_for(capability: int, head_dim: int, cache_bytes: int, *, has_window: bool) -> PrefillConfig:
    """The shipped configuration, for a cache of `cache_bytes` a number."""
    wide = _WINDOW_CONFIGS if has_window else _CONFIGS
    configs = _NARROW_CONFIGS if cache_bytes == 1 else wide
    return configs[oldest_for(capability), padded(head_dim)]


def paged_prefill(
    out: torch.Tensor,
    query: torch.Tensor,
    cache: torch.Tensor,
    batch: GpuAttentionBatch,
    *,
    window: int | None,
    key_scale: float,
    value_scale: float,
    config: PrefillConfig | None = None,
) -> None:
    """Write the rows of `out` [T, H, D] whose sequences have several new tokens.

    Arguments are checked by `kernels.gpu.paged_attention`.
    """
    num_heads, head_dim = query.shape[1:]
    num_kv_heads, block_tokens = cache.shape[2:4]
    group = num_heads // num_kv_heads
    config = config or config_for(
        capability(query.device), head_dim, cache.itemsize, has_window=window is not None
    )
    programs = len(batch.prefill_work) * _tiles(group, config)
    _prefill_kernel[(programs, num_kv_heads)](
        out,
        query,
        cache[0],
        cache[1],
        batch.counts,
        batch.prefill_work,
        batch.query_start,
        batch.context_lens,
        batch.block_tables,
        batch.block_tables.stride(0),
        query.stride(0),
        query.stride(1),
        key_scale / math.sqrt(head_dim) * math.log2(math.e),
        value_scale,
        window or 0,
        **_constants(num_kv_heads, group, head_dim, block_tokens, config),
        HAS_WINDOW=window is not None,
        WIDE=cache[0].numel() > INT32_MAX,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        maxnreg=config.max_registers,
    )


def variants() -> Iterator[Variant]:
    """Every case."""
    return (_variant(case) for case in cases())


def _variant(case: Case) -> Variant:
    config = config_for(case.oldest, case.head_dim, case.cache_bytes, has_window=case.has_window)
    pointers = {
        "out": f"*{case.dtype}",
        "query": f"*{case.dtype}",
        "keys": f"*{case.cache_dtype}",
        "values": f"*{case.cache_dtype}",
        "counts": "*i32",
        "work": "*i32",
        "query_start": "*i32",
        "context_lens": "*i32",
        "block_tables": "*i32",
    }
    strides = {"query_stride_t": "i32", "query_stride_h": "i32"}
    numbers = {"table_stride": "i32", "scale": "fp32", "value_scale": "fp32", "window": "i32"}
    return Variant(
        name=case.name("prefill"),
        kernel=_prefill_kernel,
        signature={**pointers, **strides, **numbers},
        constexprs={**_constants(8, case.group, case.head_dim, 16, config), **case.constants},
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        expects=("mma", "cp.async"),
        aligned=(*pointers, *strides),
        min_capability=case.oldest,
        max_registers=config.max_registers,
        programs=config.programs,
    )


def _constants(
    num_kv_heads: int,
    group: int,
    head_dim: int,
    block_tokens: int,
    config: PrefillConfig,
) -> dict[str, object]:
    return {
        "K": num_kv_heads,
        "G": group,
        "D": head_dim,
        "BLOCK_TOKENS": block_tokens,
        "TILES": _tiles(group, config),
        "BLOCK_D": padded(head_dim),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
    }


def _tiles(group: int, config: PrefillConfig) -> int:
    """Tiles of a work item."""
    return QUERY_BLOCK * group // config.block_m


@triton.jit
def _attend(
    acc,
    m,
    total,
    q,
    keys,
    values,
    table,
    position,  # [BLOCK_M] of the rows
    lo,
    hi,  # tokens, lo a multiple of BLOCK_N
    seen_from,  # tokens before it may be gone from the cache
    scale,
    window,
    head,
    K: tl.constexpr,
    D: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    WIDE: tl.constexpr,
    MASKED: tl.constexpr,
):
    """The rows' running softmax (acc, m, total) taken over tokens lo to hi."""
    d = tl.arange(0, BLOCK_D)
    for start in range(lo, hi, BLOCK_N):
        j = tl.multiple_of(start, BLOCK_N) + tl.arange(0, BLOCK_N)
        there = (d < D)[None, :]
        if MASKED:
            written = (j >= seen_from) & (j < hi)
            block = tl.load(table + j // BLOCK_TOKENS, mask=written, other=0)
            there = there & written[:, None]
        else:
            block = tl.load(table + j // BLOCK_TOKENS)
        if WIDE:
            block = block.to(tl.int64)
        slot = (block * K + head) * BLOCK_TOKENS + j % BLOCK_TOKENS
        place = slot[:, None] * D + d[None, :]
        k = tl.load(keys + place, mask=there, other=0.0).to(q.dtype)
        logits = tl.dot(q, tl.trans(k))
        if MASKED:
            seen = j[None, :] <= position[:, None]
            if HAS_WINDOW:
                seen = seen & (j[None, :] > position[:, None] - window)
            logits = tl.where(seen, logits, float("-inf"))
        m_next = tl.maximum(m, tl.max(logits, axis=1) * scale)
        m_used = m_next
        if MASKED and HAS_WINDOW:  # a row may see nothing yet: (-inf) - (-inf) is no number
            m_used = tl.where(m_next == float("-inf"), 0.0, m_next)
        p = tl.exp2(logits * scale - m_used[:, None])
        fade = tl.exp2(m - m_used)
        total = total * fade + tl.sum(p, axis=1)
        v = tl.load(values + place, mask=there, other=0.0).to(q.dtype)
        acc = tl.dot(p.to(q.dtype), v, acc * fade[:, None])
        m = m_next
    return acc, m, total


@triton.jit(do_not_specialize=["table_stride", "window"])
def _prefill_kernel(
    out,  # [T, H, D]
    query,  # [T, H, D], strided
    keys,  # [N, K, BLOCK_TOKENS, D]
    values,
    counts,
    work,  # [P, 2]
    query_start,
    context_lens,
    block_tables,
    table_stride,
    query_stride_t,
    query_stride_h,
    scale,  # of the logits, in base 2
    value_scale,
    window,
    K: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    TILES: tl.constexpr,  # of a work item
    BLOCK_D: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    WIDE: tl.constexpr,  # a cache of more elements than 32 bits count
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    item = tl.program_id(0) // TILES
    if item >= tl.load(counts):
        return
    sequence = tl.load(work + item * 2).to(tl.int64)
    block = tl.load(work + item * 2 + 1)
    # An item's last tiles see most: they come first, as items do.
    first_row = ((block + 1) * TILES - 1 - tl.program_id(0) % TILES) * BLOCK_M
    query_at = tl.load(query_start + sequence)
    rows = (tl.load(query_start + sequence + 1) - query_at) * G
    if first_row >= rows:
        return
    cached = tl.load(context_lens + sequence) - rows // G
    head = tl.program_id(1)

    # Past the chunk, rows repeat its last: they have numbers to compute with, and are not stored.
    r = tl.minimum(first_row + tl.arange(0, BLOCK_M), rows - 1)
    d = tl.arange(0, BLOCK_D)
    in_head = (d < D)[None, :]
    token = (query_at + r // G).to(tl.int64)
    query_head = head * G + r % G
    q_at = query + (token * query_stride_t + query_head * query_stride_h)[:, None] + d[None, :]
    q = tl.load(q_at, mask=in_head, other=0.0)
    position = cached + r // G
    first = cached + first_row // G
    last = cached + (tl.minimum(first_row + BLOCK_M, rows) - 1) // G

    table = block_tables + sequence * table_stride
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    seen_by_all = (first + 1) // BLOCK_N * BLOCK_N
    start = 0
    seen_from = 0
    if HAS_WINDOW:
        seen_from = tl.maximum(first - window + 1, 0)
        start = seen_from // BLOCK_N * BLOCK_N
        edge = tl.cdiv(tl.maximum(last - window + 1, 0), BLOCK_N) * BLOCK_N
        edge = tl.minimum(edge, tl.maximum(seen_by_all, start))
        acc, m, total = _attend(
            acc, m, total, q, keys, values, table, position, start, edge, seen_from, scale, window, head,
            K, D, BLOCK_TOKENS, BLOCK_D, BLOCK_N, HAS_WINDOW, WIDE, True,
        )  # fmt: skip
        start = edge
    acc, m, total = _attend(
        acc, m, total, q, keys, values, table, position, start, seen_by_all, seen_from, scale, window, head,
        K, D, BLOCK_TOKENS, BLOCK_D, BLOCK_N, HAS_WINDOW, WIDE, False,
    )  # fmt: skip
    acc, m, total = _attend(
        acc, m, total, q, keys, values, table, position, tl.maximum(start, seen_by_all), last + 1, seen_from,
        scale, window, head, K, D, BLOCK_TOKENS, BLOCK_D, BLOCK_N, HAS_WINDOW, WIDE, True,
    )  # fmt: skip
    acc = acc * (value_scale / total)[:, None]
    out_at = out + ((token * K * G + query_head) * D)[:, None] + d[None, :]
    in_chunk = (first_row + tl.arange(0, BLOCK_M) < rows)[:, None]
    tl.store(out_at, acc.to(out.dtype.element_ty), mask=in_chunk & in_head)
