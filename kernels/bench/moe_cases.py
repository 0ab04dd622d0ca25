"""Mixtures of experts at the shapes of Qwen3-30B-A3B and Mixtral 8x7B; torch's grouped product as peer."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from kernels.bench.case import Case, Peer, Place, nbytes
from kernels.moe import ExpertWeights, expert_mlp, expert_mlp_reference, expert_mlp_torch, route

# (E, k, d, f)
_MODELS = {"Qwen3-30B-A3B": (128, 8, 2048, 768), "Mixtral 8x7B": (8, 2, 4096, 14336)}
_TOKENS = (1, 32, 256, 8192)
_SAMPLE = 16  # tokens that are computed in float64


def cases(place: Place) -> Iterator[Case]:
    """From one token to a long prompt."""
    models, sizes = ({"tiny": (4, 2, 64, 48)}, (5,)) if place.tiny else (_MODELS, _TOKENS)
    for name, (num_experts, top_k, hidden, width) in models.items():
        gate_up = place.randn(num_experts, 2 * width, hidden) / hidden**0.5
        down = place.randn(num_experts, hidden, width, seed=1) / width**0.5
        weights = ExpertWeights(gate_up, down)
        for tokens in sizes:
            yield _case(name, tokens, top_k, weights, place)


def _case(name: str, tokens: int, top_k: int, weights: ExpertWeights, place: Place) -> Case:
    num_experts, hidden, width = weights.down.shape
    x = place.randn(tokens, hidden, seed=2)
    logits = place.randn(tokens, num_experts, seed=3)
    routing, experts = route(logits, top_k, renormalize=True)
    # Spread over the batch, so that it is not one tile that is compared.
    rows = torch.linspace(0, tokens - 1, min(tokens, _SAMPLE), device=place.device).long()
    used = len(experts.unique())
    return Case(
        shape=f"{name} T={tokens}",
        run=lambda: expert_mlp(x, weights, routing, experts),
        expected=lambda: expert_mlp_reference(x[rows], weights, routing[rows], experts[rows]),
        moved_bytes=used * nbytes(weights.gate_up[0], weights.down[0]) + 2 * nbytes(x),
        flops=2 * tokens * top_k * 3 * hidden * width,
        bound="memory" if tokens * top_k / num_experts < 256 else "bf16",
        tolerance=1e-2,
        peers=(
            Peer("torch, an expert at a time", lambda: expert_mlp_torch(x, weights, routing, experts), False),
            Peer("torch grouped_mm", lambda: _grouped(x, weights, routing, experts), cpu=False),
        ),
        rows=rows,
    )


def _grouped(
    x: torch.Tensor, weights: ExpertWeights, routing: torch.Tensor, experts: torch.Tensor
) -> torch.Tensor:
    tokens, top_k = experts.shape
    num_experts = len(weights.down)
    order = experts.flatten().argsort(stable=True)
    counts = torch.zeros(num_experts, dtype=torch.int64, device=x.device)
    counts.scatter_add_(0, experts.flatten(), torch.ones_like(experts).flatten())
    ends = counts.cumsum(0).to(torch.int32)
    gate, up = torch._grouped_mm(x[order // top_k], weights.gate_up.transpose(1, 2), offs=ends).chunk(2, -1)
    results = torch._grouped_mm(F.silu(gate) * up, weights.down.transpose(1, 2), offs=ends)
    pairs = torch.empty_like(results)
    pairs[order] = results
    return (pairs.view(tokens, top_k, -1) * routing[:, :, None]).sum(dim=1).to(x.dtype)
