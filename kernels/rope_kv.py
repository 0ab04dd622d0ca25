"""From a fused projection to what attention reads: QK-norm, RoPE and the KV write, in one launch on a GPU.

    q, k, v = split(heads)
    q, k = rope(rms_norm(q)), rope(rms_norm(k))     the norm of each head over D, where the model has one
    cache[slot] = k / key_scale, v / value_scale    rounded to the cache's dtype, e4m3 saturating

Norm and rotation as in `kernels.rms_norm` and `kernels.rope`; QK-norm as in Qwen3 (Henry et al. 2020).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kernels.dispatch import choose
from kernels.paged_attention import write_kv
from kernels.rms_norm import rms_norm, rms_norm_reference
from kernels.rope import apply_rope, apply_rope_reference
from kernels.row_quantization import LARGEST


@dataclass(frozen=True, slots=True, eq=False)
class QkNorm:
    """Weights [D] of the norms of query heads and of key heads."""

    query: torch.Tensor
    key: torch.Tensor
    eps: float


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
    """Queries [T, H, D] of heads [T, H + 2K, D] (queries, keys, values); keys and values go to the cache.

    `cos` and `sin` are `rope_table`'s, `cache` is one layer's [2, N, K, block_tokens, D] and `slots` the
    attention batch's. Scales other than 1 are for caches in e4m3.
    """
    op = choose(heads, _rope_and_write_kv_torch, "kernels.gpu.rope_kv:rope_and_write_kv")
    return op(
        heads, num_heads, cos, sin, cache, slots, norm=norm, key_scale=key_scale, value_scale=value_scale
    )


def rope_kv_reference(
    heads: torch.Tensor,
    num_heads: int,
    num_kv_heads: int,
    positions: torch.Tensor,
    frequencies: torch.Tensor,
    norm: QkNorm | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The formula in float64: queries, keys and values as they are before the cache's rounding."""
    query, key, value = heads.double().split((num_heads, num_kv_heads, num_kv_heads), dim=1)
    if norm is not None:
        query = rms_norm_reference(query, norm.query, norm.eps)
        key = rms_norm_reference(key, norm.key, norm.eps)
    query, key = (apply_rope_reference(part, positions, frequencies) for part in (query, key))
    return query, key, value


def _rope_and_write_kv_torch(
    heads: torch.Tensor,
    num_heads: int,
    cos: torch.Tensor,
    sin: torch.Tensor,
    cache: torch.Tensor,
    slots: torch.Tensor,
    *,
    norm: QkNorm | None,
    key_scale: float,
    value_scale: float,
) -> torch.Tensor:
    rotating = num_heads + cache.shape[2]
    values = heads[:, rotating:]
    rotated = apply_rope(_normed(heads[:, :rotating], num_heads, norm), cos, sin)
    keys = rotated[:, num_heads:]
    if cache.dtype is torch.float8_e4m3fn:
        keys, values = _saturated(keys, key_scale), _saturated(values, value_scale)
    write_kv(cache, keys, values, slots)
    return rotated[:, :num_heads]


def _normed(heads: torch.Tensor, num_heads: int, norm: QkNorm | None) -> torch.Tensor:
    if norm is None:
        return heads
    queries = rms_norm(heads[:, :num_heads], norm.query, norm.eps)
    return torch.cat((queries, rms_norm(heads[:, num_heads:], norm.key, norm.eps)), dim=1)


def _saturated(x: torch.Tensor, scale: float) -> torch.Tensor:
    largest = LARGEST[torch.float8_e4m3fn]
    return (x.float() / scale).clamp(-largest, largest)
