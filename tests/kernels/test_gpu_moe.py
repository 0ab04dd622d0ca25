"""The mixture of experts: its routing, its sort, and both paths against the formula."""

import pytest
import torch

from kernels.dispatch import forced
from kernels.gpu import moe as subject
from kernels.moe import (
    ExpertWeights,
    expert_mlp,
    expert_mlp_reference,
    route,
    sort_into_tiles,
)

CUDA = torch.cuda.is_available()
# The interpreter's bfloat16 is wrong by design.
DTYPES = [torch.float16, torch.bfloat16] if CUDA else [torch.float16]
TOLERANCE = {torch.float16: 3e-3, torch.bfloat16: 2e-2}
# (T, E, k, d, f): one token; experts without a token; widths that fill no tile; tall tiles of pairs
SHAPES = [(1, 4, 2, 64, 48), (7, 8, 2, 80, 33), (33, 3, 1, 130, 70), (40, 2, 2, 96, 64), (140, 2, 2, 64, 72)]


def layer(shape, dtype, device, seed=0):
    tokens, num_experts, top_k, hidden, width = shape
    generator = torch.Generator().manual_seed(seed)

    def random(*size):
        return torch.randn(*size, generator=generator)

    weights = ExpertWeights(
        (random(num_experts, 2 * width, hidden) / hidden**0.5).to(dtype).to(device),
        (random(num_experts, hidden, width) / width**0.5).to(dtype).to(device),
    )
    routing, experts = route(random(tokens, num_experts), top_k, renormalize=True)
    return random(tokens, hidden).to(dtype).to(device), weights, routing.to(device), experts.to(device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_both_paths_are_the_formula(shape, dtype, device):
    """Token by token and expert by expert in float64."""
    operands = layer(shape, dtype, device)
    expected = expert_mlp_reference(*operands)
    tolerance = TOLERANCE[dtype]
    for backend in ("torch", "triton"):
        with forced(backend):
            actual = expert_mlp(*operands)
        torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)


def test_every_size_of_tile_is_tried():
    """The shapes above reach each row of the table of configurations."""
    reached = set()
    for tokens, num_experts, top_k, _, _ in SHAPES:
        load = tokens * top_k / num_experts
        reached.add(next(one.block_m for one in subject._GATE_UP if load <= one.rows_an_expert))
    assert reached == {one.block_m for one in subject._GATE_UP}
    assert [one.block_m for one in subject._GATE_UP] == [one.block_m for one in subject._DOWN]


def test_a_broken_token_stays_alone(device):
    """What fills tiles up reads another token's row, NaN included, and leaves no trace."""
    x, weights, routing, experts = layer((9, 4, 2, 64, 48), torch.float16, device)
    with forced("triton"):
        whole = expert_mlp(x, weights, routing, experts)
        x[0] = float("nan")
        broken = expert_mlp(x, weights, routing, experts)
    assert broken[0].isnan().all()
    assert torch.equal(broken[1:], whole[1:])


def test_a_token_does_not_depend_on_others_of_its_batch(device):
    """To the bit, for one size of tile: whatever place in a tile it gets."""
    x, weights, routing, experts = layer((12, 8, 2, 96, 64), torch.float16, device)
    with forced("triton"):
        whole = expert_mlp(x, weights, routing, experts)
        for part in (slice(0, 1), slice(5, 12)):
            alone = expert_mlp(
                x[part].contiguous(), weights, routing[part].contiguous(), experts[part].contiguous()
            )
            assert torch.equal(alone, whole[part])


@pytest.mark.parametrize("sort", [sort_into_tiles, subject.sort_into_tiles])
@pytest.mark.parametrize(
    "tokens,num_experts,top_k,rows", [(1, 4, 2, 16), (50, 8, 2, 16), (9, 3, 3, 4), (33, 60, 1, 16)]
)
def test_the_sort_places_every_pair_once(tokens, num_experts, top_k, rows, sort, device):
    """In a tile of its own expert, in order; the rest of the tiles is no pair."""
    generator = torch.Generator().manual_seed(tokens)
    experts = torch.rand(tokens, num_experts, generator=generator).topk(top_k).indices.to(device)
    tiles = sort(experts, num_experts, rows)
    none = tokens * top_k
    placed = []
    for expert, pairs in zip(tiles.experts.tolist(), tiles.pairs.view(-1, rows).tolist(), strict=True):
        mine = [pair for pair in pairs if pair != none]
        assert bool(mine) == (expert >= 0)
        assert pairs == mine + [none] * (rows - len(mine))
        assert all(experts.flatten()[pair] == expert for pair in mine)
        placed += [(expert, pair) for pair in mine]
    assert placed == sorted(placed) and sorted(pair for _, pair in placed) == list(range(none))


@pytest.mark.parametrize("sort", [sort_into_tiles, subject.sort_into_tiles])
def test_the_worst_routing_fits(sort, device):
    """One pair in each of many experts needs the most tiles, and all in one the fewest."""
    assert sort(torch.arange(8, device=device)[:, None], 8, 16).experts.tolist() == list(range(8))
    one = sort(torch.zeros(32, 1, dtype=torch.int64, device=device), 8, 16)
    assert one.experts.tolist()[:3] == [0, 0, -1]


@pytest.mark.parametrize("renormalize", [True, False])
def test_routing_is_the_largest_of_a_softmax(renormalize):
    """Likeliest first; renormalised, a token's shares sum to 1."""
    logits = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    weights, experts = route(logits, 2, renormalize=renormalize)
    probabilities = logits.double().softmax(-1)
    expected, order = probabilities.sort(descending=True)
    assert torch.equal(experts, order[:, :2])
    shares = expected[:, :2] / (expected[:, :2].sum(-1, keepdim=True) if renormalize else 1)
    torch.testing.assert_close(weights.double(), shares, rtol=1e-6, atol=0)


def test_what_the_kernels_cannot_read_is_refused(device):
    """Wrong shapes, dtypes and strides are errors."""
    x, weights, routing, experts = layer((3, 4, 2, 64, 48), torch.float16, device)
    wrong = [
        ((x[:, :32], weights, routing, experts), "belong together"),
        ((x.float(), weights, routing, experts), "bfloat16 or float16"),
        ((x, weights, routing.half(), experts), "routing must be"),
        ((x.T.contiguous().T, weights, routing, experts), "contiguous"),
    ]
    for operands, why in wrong:
        with forced("triton"), pytest.raises(ValueError, match=why):
            expert_mlp(*operands)
