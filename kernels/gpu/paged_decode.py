"""Attention of one new token a sequence over a paged cache: split-KV, bound by memory bandwidth.

A work item is SPLIT_TOKENS of one sequence's context, for one key/value head; programs as many as fit on
the GPU take items in turn. The G query heads that share keys are the rows of one small product, padded to
the tensor cores' 16. A split's softmax is joined with the others' by their log-sum-exp (Flash-Decoding,
Dao et al. 2023):

    out = sum_s 2^(lse_s - lse) out_s        lse = log2 sum_s 2^lse_s

A sequence of one split is written at once. Shape legend in `kernels`; S splits.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from kernels.attention_worklist import SPLIT_TOKENS, GpuAttentionBatch
from kernels.gpu.attention_shapes import HEAD_DIMS, INT32_MAX, Case, cases, max_registers, oldest_for, padded
from kernels.gpu.device import capability, multiprocessors
from kernels.gpu.variants import Variant


@dataclass(frozen=True)
class DecodeConfig:
    """A tile of `block_n` tokens; `programs` share a multiprocessor, all at once: a launch has no more."""

    block_n: int
    num_warps: int
    num_stages: int
    programs: int

    @property
    def max_registers(self) -> int:
        return max_registers(self.programs, self.num_warps)


# (oldest capability, padded head dim) → config. What hides the memory's latency is what is in flight: some
# 20 KiB a multiprocessor on an H100, by Little's law, and as much again because it comes in bursts. A page's
# number has to be there before its tokens can be asked for, so that of five stages two hold tokens, of seven
# three; while one is computed with, the others are in flight: with head dim 128, 96 KiB.
_CONFIGS = {
    (80, 64): DecodeConfig(block_n=64, num_warps=4, num_stages=5, programs=4),
    (80, 128): DecodeConfig(block_n=32, num_warps=4, num_stages=5, programs=4),
    (80, 256): DecodeConfig(block_n=32, num_warps=4, num_stages=3, programs=3),
    (90, 64): DecodeConfig(block_n=64, num_warps=4, num_stages=5, programs=4),
    (90, 128): DecodeConfig(block_n=64, num_warps=4, num_stages=5, programs=3),
    (90, 256): DecodeConfig(block_n=32, num_warps=4, num_stages=5, programs=3),
}
# e4m3 is widened in registers, which takes more of them.
_NARROW_CONFIGS = {
    **_CONFIGS,
    (90, 64): DecodeConfig(block_n=64, num_warps=4, num_stages=7, programs=3),
    (90, 128): DecodeConfig(block_n=32, num_warps=4, num_stages=7, programs=3),
    (90, 256): DecodeConfig(block_n=32, num_warps=4, num_stages=5, programs=2),
}
_MERGE_SPLITS = 16
_MERGE_WARPS = 4
_MERGE_STAGES = 2


def config_for(capability: int, head_dim: int, cache_bytes: int) -> DecodeConfig:
    """The shipped configuration, for a cache of `cache_bytes` a number."""
    configs = _NARROW_CONFIGS if cache_bytes == 1 else _CONFIGS
    return configs[oldest_for(capability), padded(head_dim)]


def paged_decode(
    out: torch.Tensor,
    query: torch.Tensor,
    cache: torch.Tensor,
    batch: GpuAttentionBatch,
    *,
    window: int | None,
    key_scale: float,
    value_scale: float,
    config: DecodeConfig | None = None,
) -> None:
    """Write the decoding rows of `out` [T, H, D]; arguments checked by `kernels.gpu.paged_attention`."""
    num_heads, head_dim = query.shape[1:]
    num_kv_heads, block_tokens = cache.shape[2:4]
    config = config or config_for(capability(query.device), head_dim, cache.itemsize)
    items, merges = len(batch.decode_work), len(batch.merge_work)
    # Only rows with several splits use these, at the places of their items.
    partial_shape = (items if merges else 0, num_heads, head_dim)
    partials = torch.empty(partial_shape, dtype=torch.float32, device=query.device)
    lse = torch.empty(partial_shape[:2], dtype=torch.float32, device=query.device)
    programs = min(multiprocessors(query.device) * config.programs, items * num_kv_heads)
    _decode_kernel[(programs,)](
        out,
        partials,
        lse,
        query,
        cache[0],
        cache[1],
        batch.counts,
        batch.decode_work,
        batch.block_tables,
        batch.block_tables.stride(0),
        query.stride(0),
        query.stride(1),
        key_scale / math.sqrt(head_dim) * math.log2(math.e),
        value_scale,
        window or 0,
        **_constants(num_kv_heads, num_heads // num_kv_heads, head_dim, block_tokens, config),
        HAS_WINDOW=window is not None,
        WIDE=cache[0].numel() > INT32_MAX,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        maxnreg=config.max_registers,
    )
    if merges:
        _merge_kernel[(merges, num_heads)](
            out,
            partials,
            lse,
            batch.counts,
            batch.merge_work,
            window or 0,
            **_merge_constants(num_heads, head_dim, has_window=window is not None),
            num_warps=_MERGE_WARPS,
            num_stages=_MERGE_STAGES,
        )


def variants() -> Iterator[Variant]:
    """Every case of the decode kernel, and the merge of every head dim and dtype."""
    yield from (_decode_variant(case) for case in cases())
    for head_dim, dtype in itertools.product(HEAD_DIMS, ("bf16", "fp16")):
        yield _merge_variant(head_dim, dtype)


def _decode_variant(case: Case) -> Variant:
    config = config_for(case.oldest, case.head_dim, case.cache_bytes)
    pointers = {
        "out": f"*{case.dtype}",
        "partials": "*fp32",
        "lse": "*fp32",
        "query": f"*{case.dtype}",
        "keys": f"*{case.cache_dtype}",
        "values": f"*{case.cache_dtype}",
        "counts": "*i32",
        "work": "*i32",
        "block_tables": "*i32",
    }
    strides = {"query_stride_t": "i32", "query_stride_h": "i32"}
    numbers = {"table_stride": "i32", "scale": "fp32", "value_scale": "fp32", "window": "i32"}
    return Variant(
        name=case.name("decode"),
        kernel=_decode_kernel,
        signature={**pointers, **strides, **numbers},
        constexprs={**_constants(8, case.group, case.head_dim, 16, config), **case.constants},
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        expects=("mma.sync", "cp.async"),
        aligned=(*pointers, *strides),
        min_capability=case.oldest,
        max_registers=config.max_registers,
        programs=config.programs,
    )


def _merge_variant(head_dim: int, dtype: str) -> Variant:
    pointers = {"out": f"*{dtype}", "partials": "*fp32", "lse": "*fp32", "counts": "*i32", "work": "*i32"}
    return Variant(
        name=f"merge D={head_dim} {dtype}",
        kernel=_merge_kernel,
        signature={**pointers, "window": "i32"},
        constexprs=_merge_constants(32, head_dim, has_window=False),
        num_warps=_MERGE_WARPS,
        num_stages=_MERGE_STAGES,
        aligned=tuple(pointers),
    )


def _merge_constants(num_heads: int, head_dim: int, *, has_window: bool) -> dict[str, object]:
    return {
        "H": num_heads,
        "D": head_dim,
        "BLOCK_D": padded(head_dim),
        "SPLIT": SPLIT_TOKENS,
        "BLOCK_S": _MERGE_SPLITS,
        "HAS_WINDOW": has_window,
    }


def _constants(
    num_kv_heads: int, group: int, head_dim: int, block_tokens: int, config: DecodeConfig
) -> dict[str, object]:
    return {
        "K": num_kv_heads,
        "G": group,
        "D": head_dim,
        "BLOCK_TOKENS": block_tokens,
        "SPLIT": SPLIT_TOKENS,
        "BLOCK_G": max(16, triton.next_power_of_2(group)),
        "BLOCK_D": padded(head_dim),
        "BLOCK_N": config.block_n,
    }


@triton.jit(do_not_specialize=["table_stride", "window"])
def _decode_kernel(
    out,  # [T, H, D]
    partials,  # [W, H, D] float32
    lse,  # [W, H] float32, in base 2
    query,  # [T, H, D], strided
    keys,  # [N, K, BLOCK_TOKENS, D]
    values,
    counts,
    work,  # [W, 4]
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
    SPLIT: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    WIDE: tl.constexpr,  # a cache of more elements than 32 bits count
    BLOCK_N: tl.constexpr,
):
    H: tl.constexpr = K * G
    g = tl.arange(0, BLOCK_G)
    d = tl.arange(0, BLOCK_D)
    in_head = (g < G)[:, None] & (d < D)[None, :]
    for at in range(tl.program_id(0), tl.load(counts + 1) * K, tl.num_programs(0)):
        item = at // K
        head = at % K
        row = tl.load(work + item * 4).to(tl.int64)
        sequence = tl.load(work + item * 4 + 1).to(tl.int64)
        split = tl.load(work + item * 4 + 2)
        context = tl.load(work + item * 4 + 3)
        lo = split * SPLIT
        hi = tl.minimum(lo + SPLIT, context)
        seen_from = 0
        if HAS_WINDOW:
            seen_from = tl.maximum(context - window, 0)
            lo = tl.maximum(lo, seen_from // BLOCK_N * BLOCK_N)
        if lo < hi:
            q_at = query + row * query_stride_t + (head * G + g)[:, None] * query_stride_h + d[None, :]
            q = tl.load(q_at, mask=in_head, other=0.0)
            table = block_tables + sequence * table_stride
            m = tl.full([BLOCK_G], float("-inf"), tl.float32)
            total = tl.zeros([BLOCK_G], tl.float32)
            acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
            for start in range(lo, hi, BLOCK_N):
                j = start + tl.arange(0, BLOCK_N)
                seen = (j >= seen_from) & (j < hi)
                block = tl.load(table + j // BLOCK_TOKENS, mask=seen, other=0)
                if WIDE:
                    block = block.to(tl.int64)
                slot = (block * K + head) * BLOCK_TOKENS + j % BLOCK_TOKENS
                place = slot[:, None] * D + d[None, :]
                there = seen[:, None] & (d < D)[None, :]
                k = tl.load(keys + place, mask=there, other=0.0).to(q.dtype)
                logits = tl.dot(q, tl.trans(k)) * scale
                logits = tl.where(seen[None, :], logits, float("-inf"))
                m_next = tl.maximum(m, tl.max(logits, axis=1))  # finite: every tile has a token seen
                p = tl.exp2(logits - m_next[:, None])
                fade = tl.exp2(m - m_next)
                v = tl.load(values + place, mask=there, other=0.0).to(q.dtype)
                acc = tl.dot(p.to(q.dtype), v, acc * fade[:, None])
                total = total * fade + tl.sum(p, axis=1)
                m = m_next
            acc = acc * (value_scale / total)[:, None]
            heads = head * G + g
            if context <= SPLIT:
                out_at = out + (row * H + heads)[:, None] * D + d[None, :]
                tl.store(out_at, acc.to(out.dtype.element_ty), mask=in_head)
            else:
                part = item.to(tl.int64) * H + heads
                tl.store(partials + part[:, None] * D + d[None, :], acc, mask=in_head)
                tl.store(lse + part, m + tl.log2(total), mask=g < G)


@triton.jit(do_not_specialize=["window"])
def _merge_kernel(
    out,  # [T, H, D]
    partials,
    lse,
    counts,
    work,  # [R, 3]
    window,
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_S: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
):
    at = tl.program_id(0)
    head = tl.program_id(1)
    if at < tl.load(counts + 2):
        row = tl.load(work + at * 3).to(tl.int64)
        first_item = tl.load(work + at * 3 + 1).to(tl.int64)
        context = tl.load(work + at * 3 + 2)
        first = 0
        if HAS_WINDOW:
            first = tl.maximum(context - window, 0) // SPLIT
        splits = tl.cdiv(context, SPLIT)
        d = tl.arange(0, BLOCK_D)
        m = float("-inf")
        total = 0.0
        acc = tl.zeros([BLOCK_D], tl.float32)
        for start in range(first, splits, BLOCK_S):
            s = start + tl.arange(0, BLOCK_S)
            part = (first_item + s) * H + head
            part_lse = tl.load(lse + part, mask=s < splits, other=float("-inf"))
            there = (s < splits)[:, None] & (d < D)[None, :]
            part_out = tl.load(partials + part[:, None] * D + d[None, :], mask=there, other=0.0)
            m_next = tl.maximum(m, tl.max(part_lse, axis=0))
            weight = tl.exp2(part_lse - m_next)
            fade = tl.exp2(m - m_next)
            acc = acc * fade + tl.sum(weight[:, None] * part_out, axis=0)
            total = total * fade + tl.sum(weight, axis=0)
            m = m_next
        tl.store(out + (row * H + head) * D + d, (acc / total).to(out.dtype.element_ty), mask=d < D)
