"""A mixture of experts' MLP: each token goes to its k most likely of E experts.

    p_t = softmax(router_t),   S_t = the k largest of p_t
    out_t = sum_{e in S_t} w_te down_e swiglu(gate_up_e x_t)           w_te = p_te [/ sum of p over S_t]

(Shazeer et al. 2017, eq. 2; Fedus et al. 2021.) Whether w is renormalised is the model's choice.

    T tokens, k experts a token, E experts, d hidden size, f an expert's width
    pair    t * k + j: token t and its j-th expert

The GPU's path sorts the pairs by expert, fills each expert's up to whole tiles of rows (Gale et al. 2022),
and multiplies tile by tile. The number of tiles is bounded by shapes alone, so nothing waits for the
device, and a captured graph serves any routing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from kernels.dispatch import choose
from kernels.swiglu import swiglu


@dataclass(frozen=True, slots=True, eq=False)
class ExpertWeights:
    """One layer's experts."""

    gate_up: torch.Tensor  # [E, 2f, d], gate in the first half
    down: torch.Tensor  # [E, d, f]


@dataclass(frozen=True, slots=True, eq=False)
class ExpertTiles:
    """Pairs sorted by expert, every expert's filled up to whole tiles of `rows` pairs.

    P is the most that there can be, a multiple of `rows`; what is not a pair is T * k.
    """

    rows: int
    pairs: torch.Tensor  # int32 [P]
    experts: torch.Tensor  # int32 [P / rows]; -1 where the tile is empty


def route(router_logits: torch.Tensor, top_k: int, *, renormalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """router_logits [T, E] -> (weights float32 [T, k], experts int64 [T, k]), likeliest first."""
    weights, experts = router_logits.float().softmax(dim=-1).topk(top_k, dim=-1)
    if renormalize:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return weights, experts


def sort_into_tiles(experts: torch.Tensor, num_experts: int, rows: int) -> ExpertTiles:
    """experts [T, k] -> tiles; pairs of an expert stay in order. No value of it is read by the host."""
    chosen = experts.flatten()
    num_pairs = len(chosen)
    capacity = tile_capacity(num_pairs, num_experts, rows)
    order = chosen.argsort(stable=True)
    counts = torch.zeros(num_experts, dtype=torch.int64, device=chosen.device)
    counts.scatter_add_(0, chosen, torch.ones_like(chosen))  # integers: the order does not matter
    filled = (counts + rows - 1) // rows * rows
    ends, tile_ends = counts.cumsum(0), filled.cumsum(0)
    by_expert = chosen[order]
    moved = (tile_ends - filled - ends + counts)[by_expert]
    pairs = torch.full((capacity,), num_pairs, dtype=torch.int32, device=chosen.device)
    places = torch.arange(num_pairs, device=chosen.device) + moved
    pairs.scatter_(0, places, order.to(torch.int32))
    starts = torch.arange(0, capacity, rows, device=chosen.device)
    tile_experts = torch.searchsorted(tile_ends, starts, right=True)
    tile_experts = torch.where(starts < tile_ends[-1], tile_experts, -1)
    return ExpertTiles(rows, pairs, tile_experts.to(torch.int32))


def tile_capacity(num_pairs: int, num_experts: int, rows: int) -> int:
    """P, for any routing."""
    # An expert wastes at most rows - 1, and those without a pair waste nothing.
    most = num_pairs + min(num_experts, num_pairs) * (rows - 1)
    return -(-most // rows) * rows


def expert_mlp(
    x: torch.Tensor, weights: ExpertWeights, routing: torch.Tensor, experts: torch.Tensor
) -> torch.Tensor:
    """x [T, d]; routing float32 [T, k] and experts [T, k] of `route` -> [T, d] in x's dtype."""
    mlp = choose(x, expert_mlp_torch, "kernels.gpu.moe:expert_mlp")
    return mlp(x, weights, routing, experts)


def expert_mlp_reference(
    x: torch.Tensor, weights: ExpertWeights, routing: torch.Tensor, experts: torch.Tensor
) -> torch.Tensor:
    """The formula, one token and one expert at a time, in float64."""
    out = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    for t, token in enumerate(x.double()):
        for share, expert in zip(routing[t].double(), experts[t].tolist(), strict=True):
            gate, up = (weights.gate_up[expert].double() @ token).chunk(2)
            out[t] += share * (weights.down[expert].double() @ (gate * gate.sigmoid() * up))
    return out


def expert_mlp_torch(
    x: torch.Tensor, weights: ExpertWeights, routing: torch.Tensor, experts: torch.Tensor
) -> torch.Tensor:
    """`expert_mlp` by one library product an expert; reads the routing on the host."""
    tokens, top_k = experts.shape
    pairs = torch.zeros(tokens * top_k, x.shape[1], dtype=torch.float32, device=x.device)
    for expert in experts.unique().tolist():
        mine = (experts.flatten() == expert).nonzero().squeeze(1)
        hidden = swiglu(F.linear(x[mine // top_k], weights.gate_up[expert]))
        pairs[mine] = F.linear(hidden, weights.down[expert]).float()
    # Added in the order of a token's experts, whoever else is in the batch.
    return (pairs.view(tokens, top_k, -1) * routing[:, :, None]).sum(dim=1).to(x.dtype)
