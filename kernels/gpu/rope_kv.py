"""QK-norm, RoPE and the KV write in one launch over [T, heads]. Formulas in `kernels.rope_kv`.

A program has one token and HEADS of its H + 2K heads, whatever they are: queries go out, keys and values
to the cache. A head is two halves side by side, because a rotation pairs i with i + D/2. All is float32
until the one rounding at the end.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from kernels.gpu.row_quantization import e4m3_bits
from kernels.gpu.variants import Variant
from kernels.rope_kv import QkNorm

_HEADS = 8
_WARPS = 4


@triton.jit
def _stored(x, like, scale, FP8: tl.constexpr):
    if FP8:
        return e4m3_bits(tl.div_rn(x, scale))
    else:
        return x.to(like.dtype.element_ty)


@triton.jit
def _rope_kv_kernel(
    heads,  # [T, H + 2K, D]
    cos,  # float32 [T, D]
    sin,  # float32 [T, D]: the second half is of the angles, the first of their opposites
    query_norm,  # [D], read where NORM
    key_norm,
    queries,  # [T, H, D]
    cache,  # [2, N, K, block_tokens, D]
    slots,  # int32 [T]
    num_heads,
    num_kv_heads,
    token_stride,
    head_stride,
    values_offset,  # from a key in the cache to its value
    block_tokens,
    eps,
    key_scale,
    value_scale,
    NORM: tl.constexpr,
    FP8: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    at = tl.arange(0, BLOCK)
    is_query = (head < num_heads)[:, None]
    is_value = (head >= num_heads + num_kv_heads)[:, None]
    inside = (at < HALF)[None, :]
    mask = (head < num_heads + 2 * num_kv_heads)[:, None] & inside

    source = heads + token * token_stride + head[:, None] * head_stride + at[None, :]
    first = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(source + HALF, mask=mask, other=0.0).to(tl.float32)
    turned_first, turned_second = first, second
    if NORM:
        squares = tl.sum(first * first + second * second, axis=1) / (2 * HALF)
        inverse = tl.rsqrt(squares + eps)[:, None]
        weights = tl.where(is_query, query_norm, key_norm) + at[None, :]
        turned_first = first * inverse * tl.load(weights, mask=mask, other=0.0).to(tl.float32)
        turned_second = second * inverse * tl.load(weights + HALF, mask=mask, other=0.0).to(tl.float32)
    table = token * (2 * HALF) + HALF + at
    c = tl.load(cos + table, mask=at < HALF, other=0.0)[None, :]
    s = tl.load(sin + table, mask=at < HALF, other=0.0)[None, :]
    rotated_first = turned_first * c - turned_second * s
    rotated_second = turned_second * c + turned_first * s

    places = queries + (token * num_heads + head[:, None]) * (2 * HALF) + at[None, :]
    tl.store(places, rotated_first.to(queries.dtype.element_ty), mask=is_query & inside)
    tl.store(places + HALF, rotated_second.to(queries.dtype.element_ty), mask=is_query & inside)

    slot = tl.load(slots + token)
    if slot >= 0:
        block = (slot // block_tokens).to(tl.int64)
        kv_head = head[:, None] - num_heads - tl.where(is_value, num_kv_heads, 0)
        row = (block * num_kv_heads + kv_head) * block_tokens + slot % block_tokens
        kept_at = cache + row * (2 * HALF) + at[None, :] + tl.where(is_value, values_offset, 0)
        kept = mask & (head >= num_heads)[:, None]
        scale = tl.broadcast_to(tl.where(is_value, value_scale, key_scale), first.shape)
        kept_first = tl.where(is_value, first, rotated_first)
        tl.store(kept_at, _stored(kept_first, cache, scale, FP8), mask=kept)
        kept_second = tl.where(is_value, second, rotated_second)
        tl.store(kept_at + HALF, _stored(kept_second, cache, scale, FP8), mask=kept)


def rope_and_write_kv(
    heads: torch.Tensor,
    num_heads: int,
    cos: torch.Tensor,
    sin: torch.Tensor,
    cache: torch.Tensor,
    slots: torch.Tensor,
    *,
    norm: QkNorm | None = None,
    key_scale: float = 1.0,
    value_scale: float = 1.0,
) -> torch.Tensor:
    """As `kernels.rope_kv.rope_and_write_kv`; slots int32 [T], and a token of a negative slot is not kept.

    Raises ValueError where shapes, strides or dtypes are not the kernel's.
    """
    _check(heads, num_heads, cos, sin, cache, slots)
    tokens, _, head_dim = heads.shape
    num_kv_heads = cache.shape[2]
    fp8 = cache.dtype is torch.float8_e4m3fn
    queries = torch.empty(tokens, num_heads, head_dim, dtype=heads.dtype, device=heads.device)
    if tokens:
        _rope_kv_kernel[(tokens, triton.cdiv(num_heads + 2 * num_kv_heads, _HEADS))](
            heads,
            cos,
            sin,
            heads if norm is None else norm.query,
            heads if norm is None else norm.key,
            queries,
            cache.view(torch.uint8) if fp8 else cache,
            slots,
            num_heads,
            num_kv_heads,
            heads.stride(0),
            heads.stride(1),
            cache.stride(0),
            cache.shape[3],
            0.0 if norm is None else norm.eps,
            key_scale,
            value_scale,
            NORM=norm is not None,
            FP8=fp8,
            HALF=head_dim // 2,
            BLOCK=triton.next_power_of_2(head_dim // 2),
            HEADS=_HEADS,
            num_warps=_WARPS,
        )
    return queries


def _check(
    heads: torch.Tensor,
    num_heads: int,
    cos: torch.Tensor,
    sin: torch.Tensor,
    cache: torch.Tensor,
    slots: torch.Tensor,
) -> None:
    tokens, total, head_dim = heads.shape
    if head_dim % 2 or heads.stride(2) != 1:
        raise ValueError(f"heads {tuple(heads.shape)} of strides {heads.stride()}: D even, a head adjacent")
    if not cache.is_contiguous() or total != num_heads + 2 * cache.shape[2] or cache.shape[4] != head_dim:
        raise ValueError(f"cache {tuple(cache.shape)} is not of {num_heads} of {total} heads, contiguous")
    if cache.dtype not in (heads.dtype, torch.float8_e4m3fn):
        raise ValueError(f"a cache of {cache.dtype}: that of the heads, {heads.dtype}, or float8_e4m3fn")
    for table in (cos, sin):
        if (
            table.dtype is not torch.float32
            or table.numel() != tokens * head_dim
            or not table.is_contiguous()
        ):
            raise ValueError(f"a rope table is float32 [T, 1, D], not {table.dtype} {tuple(table.shape)}")
    if slots.shape != (tokens,) or slots.dtype is not torch.int32 or not slots.is_contiguous():
        raise ValueError(f"slots are int32 [T], not {slots.dtype} {tuple(slots.shape)}")


def variants() -> Iterator[Variant]:
    """Every head dim, with and without QK-norm, into a cache as it is and in e4m3."""
    for kind in ("bf16", "fp16"):
        for head_dim in (64, 80, 96, 128, 256):
            for norm in (False, True):
                for stored in (kind, "u8"):
                    yield _variant(kind, head_dim, norm, stored)


def _variant(kind: str, head_dim: int, norm: bool, stored: str) -> Variant:
    pointers = ("heads", "cos", "sin", "query_norm", "key_norm", "queries", "cache", "slots")
    numbers = ("num_heads", "num_kv_heads", "token_stride", "head_stride", "block_tokens")
    return Variant(
        name=f"rope_kv {kind} D={head_dim}{' qk_norm' if norm else ''} to {stored}",
        kernel=_rope_kv_kernel,
        signature={
            **dict.fromkeys(pointers, f"*{kind}"),
            **dict.fromkeys(("cos", "sin"), "*fp32"),
            "cache": f"*{stored}",
            "slots": "*i32",
            **dict.fromkeys(numbers, "i32"),
            "values_offset": "i64",  # beyond 2**31 values in a layer's cache; narrower is cheaper
            **dict.fromkeys(("eps", "key_scale", "value_scale"), "fp32"),
        },
        constexprs={
            "NORM": norm,
            "FP8": stored == "u8",
            "HALF": head_dim // 2,
            "BLOCK": triton.next_power_of_2(head_dim // 2),
            "HEADS": _HEADS,
        },
        num_warps=_WARPS,
        num_stages=3,
        aligned=(*pointers, "token_stride", "head_stride", "values_offset", "block_tokens"),
    )
