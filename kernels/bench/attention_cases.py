"""Paged attention at the targets' shapes; most peers are given contiguous keys, which is easier."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn

from kernels.bench.case import Bound, Case, Peer, Place, nbytes
from kernels.dispatch import forced
from kernels.paged_attention import paged_attention, plan_attention

_BLOCK_TOKENS = 16
_LLAMA_8B = (32, 8, 128)  # H, K, D
_DECODES = ((1, 262_144), (8, 32_768), (32, 8192), (256, 1024))  # sequences, context
# (cached, new) tokens of each sequence
_PREFILLS = (((0, 8192),), ((0, 2048),) * 4, ((6144, 2048),), ((30_720, 2048),))
_SAMPLE = 16  # rows that are computed in float64
_VARLEN_PARAMETERS = inspect.signature(varlen_attn).parameters
_PEER_BLOCK_TOKENS = 256  # FlashAttention-2 takes multiples of it


@dataclass(frozen=True, eq=False)
class _Step:
    """Sequences of `spans` (cached, new) over a cache whose blocks are in random order."""

    spans: tuple[tuple[int, int], ...]
    query: torch.Tensor  # [T, H, D]
    cache: torch.Tensor
    run: Callable[[], torch.Tensor]
    tables: torch.Tensor  # [B, M]

    def contiguous(self, b: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [context, K, D] of a sequence."""
        context = sum(self.spans[b])
        blocks = self.tables[b, : -(-context // _BLOCK_TOKENS)].long()
        # As bytes: not every version of torch indexes float8.
        chosen = self.cache.view(torch.uint8)[:, blocks].view(self.cache.dtype)
        keys, values = chosen.transpose(2, 3).flatten(1, 2)[:, :context]
        return keys, values


def decode_cases(place: Place) -> Iterator[Case]:
    """One new token a sequence."""
    shapes = ((3, 70),) if place.tiny else _DECODES
    heads = (4, 2, 64) if place.tiny else _LLAMA_8B
    for sequences, context in shapes:
        step = _step(((context - 1, 1),) * sequences, heads, place)
        tokens = sequences * context
        peers = (*_decode_sdpa(step), *_varlen_peer(step))
        yield _case(step, f"decode B={sequences} ctx={context}", tokens, tokens, "memory", peers)
    if place.tiny or torch.cuda.get_device_capability() >= (8, 9):
        sequences, context = (2, 70) if place.tiny else (32, 8192)
        step = _step(((context - 1, 1),) * sequences, heads, place, narrow=True)
        name = f"decode e4m3 B={sequences} ctx={context}"
        yield _case(step, name, sequences * context, sequences * context, "memory", ())


def prefill_cases(place: Place) -> Iterator[Case]:
    """Whole prompts and chunks behind a context."""
    heads = (4, 2, 64) if place.tiny else _LLAMA_8B
    for spans in (((0, 20),), ((17, 5), (0, 9))) if place.tiny else _PREFILLS:
        step = _step(spans, heads, place)
        seen = sum(cached * new + new * (new + 1) // 2 for cached, new in spans)
        alike = set(spans) == {(0, spans[0][1])}
        peers = (*(_prefill_sdpa(step) if alike else ()), *_varlen_peer(step))
        name = " ".join(f"{new}@{cached}" for cached, new in spans)
        tokens = sum(cached + new for cached, new in spans)
        yield _case(step, f"prefill {name}", tokens, seen, "bf16", peers)


def _case(step: _Step, name: str, tokens: int, seen: int, bound: Bound, peers: tuple[Peer, ...]) -> Case:
    num_tokens, num_heads, head_dim = step.query.shape
    rows = torch.linspace(0, num_tokens - 1, min(num_tokens, _SAMPLE)).long()
    kv_bytes = 2 * tokens * step.cache.shape[2] * head_dim * step.cache.element_size()
    return Case(
        shape=f"{name} H={num_heads} K={step.cache.shape[2]} D={head_dim}",
        run=step.run,
        expected=lambda: torch.stack([_float64(step, row) for row in rows.tolist()]),
        moved_bytes=kv_bytes + 2 * nbytes(step.query),
        flops=4 * num_heads * head_dim * seen,
        bound=bound,
        tolerance=2e-2,
        peers=peers,
        rows=rows.to(step.query.device),
    )


def _step(
    spans: tuple[tuple[int, int], ...], heads: tuple[int, int, int], place: Place, *, narrow: bool = False
) -> _Step:
    num_heads, num_kv_heads, head_dim = heads
    contexts = np.array([cached + new for cached, new in spans], dtype=np.int32)
    query_start = np.cumsum([0, *(new for _, new in spans)]).astype(np.int32)
    width = int(-(-contexts.max() // _BLOCK_TOKENS))
    order = np.random.default_rng(0).permutation(len(spans) * width).astype(np.int32)
    tables = order.reshape(len(spans), width)
    cache = place.randn(2, len(spans) * width, num_kv_heads, _BLOCK_TOKENS, head_dim)
    if narrow:
        cache = cache.to(torch.float8_e4m3fn)
    query = place.randn(int(query_start[-1]), num_heads, head_dim, seed=1)
    slots = np.zeros(len(query), dtype=np.int32)  # nothing is written here
    with forced("triton"):
        batch = plan_attention(slots, query_start, contexts, tables, cache=cache, dtype=query.dtype)
    on_device = torch.from_numpy(tables).to(place.device)
    return _Step(spans, query, cache, lambda: paged_attention(query, cache, batch), on_device)


def _float64(step: _Step, row: int) -> torch.Tensor:
    """One row [H, D] of the formula."""
    starts = list(itertools.accumulate((new for _, new in step.spans), initial=0))
    b = next(i for i in range(len(step.spans)) if row < starts[i + 1])
    seen = step.spans[b][0] + row - starts[b] + 1
    keys, values = (part[:seen].double() for part in step.contiguous(b))
    query = step.query[row].double().view(keys.shape[1], -1, keys.shape[2])
    weights = torch.einsum("kgd,tkd->kgt", query / keys.shape[2] ** 0.5, keys).softmax(dim=-1)
    return torch.einsum("kgt,tkd->kgd", weights, values).flatten(0, 1)


def _decode_sdpa(step: _Step) -> Iterator[Peer]:
    """The G heads that share keys are the queries of one head: no library call does with fewer bytes."""
    keys, values = zip(*(step.contiguous(b) for b in range(len(step.spans))), strict=True)
    k, v = torch.stack(keys).transpose(1, 2), torch.stack(values).transpose(1, 2)  # [B, K, context, D]
    query = step.query.unflatten(1, (k.shape[1], -1))  # [B, K, G, D]
    yield from _sdpa(query, k, v, is_causal=False, enable_gqa=False)


def _prefill_sdpa(step: _Step) -> Iterator[Peer]:
    """Whole prompts, all of one length."""
    sequences = range(len(step.spans))
    keys, values = zip(*map(step.contiguous, sequences), strict=True)
    parts = step.query.unflatten(0, (len(sequences), -1)), torch.stack(keys), torch.stack(values)
    query, k, v = (part.transpose(1, 2) for part in parts)
    yield from _sdpa(query, k, v, is_causal=True, enable_gqa=True)


def _sdpa(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *, is_causal: bool, enable_gqa: bool
) -> Iterator[Peer]:
    keys, values = keys.contiguous(), values.contiguous()

    def by(backend: SDPBackend) -> Callable[[], torch.Tensor]:
        def run() -> torch.Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(
                    query, keys, values, is_causal=is_causal, enable_gqa=enable_gqa
                )

        return run

    yield Peer("SDPA flash", by(SDPBackend.FLASH_ATTENTION), cpu=not enable_gqa)
    yield Peer("SDPA cuDNN", by(SDPBackend.CUDNN_ATTENTION), cpu=False)


def _varlen_peer(step: _Step) -> Iterator[Peer]:
    """torch's FlashAttention over sequences laid end to end, and over blocks of its own size in random
    order; its arguments differ between versions."""
    keys, values = (
        torch.cat(parts) for parts in zip(*map(step.contiguous, range(len(step.spans))), strict=True)
    )
    options: dict[str, Any] = {"is_causal": True}
    if "is_causal" not in _VARLEN_PARAMETERS:
        options = {"window_size": (-1, 0)}
    if "enable_gqa" in _VARLEN_PARAMETERS:
        options["enable_gqa"] = True
    else:
        group = step.query.shape[1] // keys.shape[1]
        keys, values = (part.repeat_interleave(group, dim=1) for part in (keys, values))
    news, contexts = [new for _, new in step.spans], [sum(span) for span in step.spans]
    starts = (_starts(news, step.query.device), _starts(contexts, step.query.device))

    def run() -> object:
        return varlen_attn(step.query, keys, values, *starts, max(news), max(contexts), **options)

    yield Peer("torch varlen_attn", run, cpu=False)
    if "block_table" not in _VARLEN_PARAMETERS:
        yield Peer("torch varlen_attn, paged", _no_block_table, cpu=False)
        return
    pool_keys, pool_values, tables = _pages(step)
    used = torch.tensor(contexts, dtype=torch.int32, device=step.query.device)

    def run_paged() -> object:
        return varlen_attn(
            step.query, pool_keys, pool_values, *starts, max(news), max(contexts), **options,
            seqused_k=used, block_table=tables,
        )  # fmt: skip

    yield Peer("torch varlen_attn, paged", run_paged, cpu=False)


def _no_block_table() -> object:
    raise NotImplementedError(f"torch {torch.__version__} has no block_table")


def _pages(step: _Step) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys and values [pages, _PEER_BLOCK_TOKENS, K, D] in random order, and tables [B, M] of them."""
    width = -(-max(sum(span) for span in step.spans) // _PEER_BLOCK_TOKENS)
    count = len(step.spans) * width
    device = step.query.device
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).to(device)
    shape = (count, _PEER_BLOCK_TOKENS, step.cache.shape[2], step.cache.shape[4])
    pools = torch.zeros(2, *shape, dtype=step.query.dtype, device=device)
    tables = order.view(len(step.spans), width)
    for b, table in enumerate(tables):
        for pool, part in zip(pools, step.contiguous(b), strict=True):
            padded = F.pad(part, (0, 0, 0, 0, 0, width * _PEER_BLOCK_TOKENS - len(part)))
            pool[table] = padded.unflatten(0, (width, -1))
    return pools[0], pools[1], tables.to(torch.int32)


def _starts(lengths: list[int], device: torch.device) -> torch.Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)
