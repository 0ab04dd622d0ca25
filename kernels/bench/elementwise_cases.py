"""Norms, gates and rotations at an 8B model's widths, beside torch, eager and compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from kernels.bench.case import Case, Peer, Place, nbytes
from kernels.rms_norm import add_rms_norm, rms_norm, rms_norm_reference
from kernels.rope import apply_rope, rope_frequencies, rope_table
from kernels.rope_kv import rope_and_write_kv, rope_kv_reference
from kernels.swiglu import swiglu, swiglu_reference

_TOKENS = (64, 8192)
_HIDDEN, _WIDTH = 4096, 14336
_HEADS = (32, 8, 128)  # H, K, D
_BLOCK_TOKENS = 16
_EPS = 1e-5


def rms_norm_cases(place: Place) -> Iterator[Case]:
    """Alone, and with the residual's sum."""
    hidden = 90 if place.tiny else _HIDDEN
    for tokens in _tokens(place):
        x, residual = place.randn(tokens, hidden), place.randn(tokens, hidden, seed=1)
        weight = place.randn(hidden, seed=2)
        yield _norm(x, weight)
        yield _add_norm(x, residual, weight)


def swiglu_cases(place: Place) -> Iterator[Case]:
    """The gate of a fused projection."""
    width = 45 if place.tiny else _WIDTH
    for tokens in _tokens(place):
        yield _gate(place.randn(tokens, 2 * width))


def rope_kv_cases(place: Place) -> Iterator[Case]:
    """From the projection to the cache; what it writes is compared by the tests."""
    num_heads, num_kv_heads, head_dim = (6, 2, 64) if place.tiny else _HEADS
    for tokens in _tokens(place):
        yield _rope_kv(place, tokens, num_heads, num_kv_heads, head_dim)


def _tokens(place: Place) -> tuple[int, ...]:
    return (5,) if place.tiny else _TOKENS


def _norm(x: torch.Tensor, weight: torch.Tensor) -> Case:
    def library(rows: torch.Tensor = x) -> torch.Tensor:
        return F.rms_norm(rows, weight.shape, weight, _EPS)

    return Case(
        shape=f"norm {tuple(x.shape)}",
        run=lambda: rms_norm(x, weight, _EPS),
        expected=lambda: rms_norm_reference(x.double(), weight, _EPS),
        moved_bytes=2 * nbytes(x) + nbytes(weight),
        flops=4 * x.numel(),
        bound="memory",
        tolerance=1e-2,
        peers=_eager_and_compiled(library),
    )


def _add_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> Case:
    # The residual is overwritten: what is timed runs on a copy, and the first run is on the original.
    original = residual.clone()

    def ours() -> torch.Tensor:
        return add_rms_norm(x, residual, weight, _EPS)[0]

    def library() -> torch.Tensor:
        residual.add_(x)
        return F.rms_norm(residual, weight.shape, weight, _EPS)

    return Case(
        shape=f"add + norm {tuple(x.shape)}",
        run=ours,
        expected=lambda: rms_norm_reference(x.double() + original.double(), weight, _EPS),
        moved_bytes=4 * nbytes(x) + nbytes(weight),
        flops=5 * x.numel(),
        bound="memory",
        tolerance=1e-2,
        peers=_eager_and_compiled(library),
    )


def _gate(gate_up: torch.Tensor) -> Case:
    def library() -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    return Case(
        shape=f"gate {tuple(gate_up.shape)}",
        run=lambda: swiglu(gate_up),
        expected=lambda: swiglu_reference(gate_up.double()),
        moved_bytes=nbytes(gate_up) * 3 // 2,
        flops=3 * gate_up.numel(),
        bound="memory",
        tolerance=1e-2,
        peers=_eager_and_compiled(library),
    )


def _rope_kv(place: Place, tokens: int, num_heads: int, num_kv_heads: int, head_dim: int) -> Case:
    heads = place.randn(tokens, num_heads + 2 * num_kv_heads, head_dim)
    positions = torch.arange(tokens, device=place.device)
    frequencies = rope_frequencies(head_dim, 10_000.0).to(place.device)
    cos, sin = rope_table(positions, frequencies)
    num_blocks = -(-tokens // _BLOCK_TOKENS)
    cache = place.randn(2, num_blocks, num_kv_heads, _BLOCK_TOKENS, head_dim)
    slots = positions.to(torch.int32)

    def library() -> torch.Tensor:
        rotated = apply_rope(heads[:, : num_heads + num_kv_heads], cos, sin)
        block, offset = positions // _BLOCK_TOKENS, positions % _BLOCK_TOKENS
        cache[0, block, :, offset] = rotated[:, num_heads:]
        cache[1, block, :, offset] = heads[:, num_heads + num_kv_heads :]
        return rotated[:, :num_heads]

    return Case(
        shape=f"rope + KV {tuple(heads.shape)}",
        run=lambda: rope_and_write_kv(heads, num_heads, cos, sin, cache, slots),
        expected=lambda: rope_kv_reference(heads, num_heads, num_kv_heads, positions, frequencies, None)[0],
        moved_bytes=2 * nbytes(heads) + nbytes(cos, sin),
        flops=3 * heads.numel(),
        bound="memory",
        tolerance=1e-2,
        peers=_eager_and_compiled(library),
    )


def _eager_and_compiled(library: Callable[[], torch.Tensor]) -> tuple[Peer, ...]:
    return Peer("torch", library), Peer("torch.compile", torch.compile(library), cpu=False)
