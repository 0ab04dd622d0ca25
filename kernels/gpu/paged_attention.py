"""Paged attention of a mixed batch: one launch for all chunks, one or two for all decodes."""

from __future__ import annotations

import torch

from kernels.attention_worklist import GpuAttentionBatch
from kernels.gpu.attention_shapes import HEAD_DIMS
from kernels.gpu.device import capability
from kernels.gpu.paged_decode import paged_decode
from kernels.gpu.paged_prefill import paged_prefill

_QUERY_DTYPES = (torch.bfloat16, torch.float16)
_MIN_BLOCK_TOKENS = 16
_E4M3_CAPABILITY = 89
_STRIDE = 16  # elements: rows start at what the widest loads are aligned to


def paged_attention(
    query: torch.Tensor,
    cache: torch.Tensor,
    batch: GpuAttentionBatch,
    *,
    window: int | None = None,
    key_scale: float = 1.0,
    value_scale: float = 1.0,
) -> torch.Tensor:
    """As `kernels.paged_attention.paged_attention`. Rows without work (of a graph's padding) are undefined.

    Raises ValueError where shapes, strides or dtypes are not those of the kernels.
    """
    _check(query, cache)
    if window is not None and window < 1:
        raise ValueError(f"a window of {window} tokens: it counts the token itself, so at least 1")
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    if len(batch.prefill_work):
        paged_prefill(out, query, cache, batch, window=window, key_scale=key_scale, value_scale=value_scale)
    if len(batch.decode_work):
        paged_decode(out, query, cache, batch, window=window, key_scale=key_scale, value_scale=value_scale)
    return out


def _check(query: torch.Tensor, cache: torch.Tensor) -> None:
    head_dim, num_heads = query.shape[2], query.shape[1]
    num_kv_heads, block_tokens = cache.shape[2:4]
    if head_dim not in HEAD_DIMS or cache.shape[4] != head_dim:
        raise ValueError(f"head dims {head_dim} and {cache.shape[4]} of the cache: both one of {HEAD_DIMS}")
    if num_heads % num_kv_heads:
        raise ValueError(f"{num_heads} query heads do not share {num_kv_heads} evenly")
    if block_tokens < _MIN_BLOCK_TOKENS or block_tokens & (block_tokens - 1):
        raise ValueError(f"blocks of {block_tokens} tokens: a power of two, at least {_MIN_BLOCK_TOKENS}")
    if not cache.is_contiguous():
        raise ValueError("the cache of a layer must be contiguous")
    if query.stride(2) != 1 or query.stride(0) % _STRIDE or query.stride(1) % _STRIDE:
        raise ValueError(f"query strides {query.stride()}: the last 1, the others multiples of {_STRIDE}")
    if query.is_cuda and query.dtype not in _QUERY_DTYPES:
        raise ValueError(f"queries of {query.dtype}: one of {_QUERY_DTYPES}")
    if cache.dtype == torch.float8_e4m3fn and capability(query.device) < _E4M3_CAPABILITY:
        raise ValueError("this GPU has no e4m3 instructions for a float8_e4m3fn cache")
    if cache.dtype not in (query.dtype, torch.float8_e4m3fn):
        raise ValueError(f"a cache of {cache.dtype}: that of the queries, {query.dtype}, or float8_e4m3fn")
