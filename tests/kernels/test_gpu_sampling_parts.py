"""The arithmetic and the searches of the sampling kernels, one by one, against exact integers."""

import pytest
import torch
import triton
import triton.language as tl

from kernels import sampling
from kernels.gpu.sampling_kernels import _entry_at, _find_cut
from kernels.gpu.token_weights import random_part_of, share_of, units, weigh
from kernels.sampling import random_bits


def test_weights_are_exponentials():
    """To two float32 roundings of exponent and result, over all weights there are; the largest is 1."""
    logits = torch.cat((torch.linspace(-27.8, 0, 40_001), -torch.logspace(-8, 0, 1001)))[None]
    for temperature in (0.5, 1.0, 1.7):
        scaled = logits * temperature
        weights = sampling.weigh(scaled, torch.tensor([temperature]))
        exact = (scaled.double() / temperature).exp()
        kept = exact > sampling.UNIT * 1.001
        relative = ((weights.double() - exact).abs() / exact)[kept]
        assert (relative <= 1.3e-7 + 2.5e-7 * (-exact.log())[kept]).all()
        assert weights.max() == 1 and not weights[exact < sampling.UNIT * 0.999].any()


@triton.jit
def _weigh_each(logits, largest, temperature, min_p, bits, whole, N: tl.constexpr):
    at = tl.arange(0, N)
    weights = weigh(tl.load(logits + at), at >= 0, tl.load(largest), tl.load(temperature), tl.load(min_p))
    tl.store(bits + at, weights)
    tl.store(whole + at, units(weights))


@pytest.mark.parametrize("temperature", [1e-38, 0.01, 0.7, 1.0, 3.3])
def test_weights_are_the_torch_paths_to_the_bit(temperature, device):
    """The kernel's exponential and its integers, at exponents from nothing to far below the unit."""
    logits = torch.randn(2048, generator=torch.Generator().manual_seed(7)) * 20 * max(temperature, 1e-3)
    logits[:512] = -torch.logspace(-9, 2, 512)
    logits[512:600] = logits.max() + 0 * logits[512:600]
    logits = logits.to(device)
    one, bits = torch.tensor([temperature], device=device), torch.empty_like(logits, dtype=torch.int32)
    whole = torch.empty_like(logits, dtype=torch.int64)
    _weigh_each[(1,)](logits, logits.max(), one, 0 * one, bits, whole, N=2048, enable_fp_fusion=False)
    expected = sampling.weigh(logits[None], one)[0]
    assert bits.equal(expected.view(torch.int32)) and whole.equal(sampling._units(expected))


@triton.jit
def _part_each(totals, seeds, positions, shares, drawn, shared, N: tl.constexpr):
    at = tl.arange(0, N)
    total = tl.load(totals + at)
    tl.store(drawn + at, random_part_of(total, tl.load(seeds + at), tl.load(positions + at)))
    tl.store(shared + at, share_of(total, tl.load(shares + at)))


def test_parts_of_sums_are_exact(device):
    """u * total and top_p * total, in 64 bits, for totals up to 2^61, are what Python's integers say."""
    generator = torch.Generator().manual_seed(8)
    totals = torch.randint(2**61, (256,), generator=generator) >> torch.arange(256) % 22
    seeds = torch.randint(-(2**63), 2**63 - 1, (256,), generator=generator)
    positions = torch.randint(2**31 - 1, (256,), generator=generator, dtype=torch.int32)
    shares = torch.rand(256, generator=generator)
    shares[:3] = torch.tensor([0.0, 1.0, 0.5])
    drawn, shared = torch.empty(2, 256, dtype=torch.int64, device=device)
    inputs = (part.to(device) for part in (totals, seeds, positions, shares))
    _part_each[(1,)](*inputs, drawn, shared, N=256)
    rows = list(zip(totals.tolist(), seeds.tolist(), positions.tolist(), shares.tolist(), strict=True))
    assert drawn.tolist() == [total * random_bits(seed, at) >> 48 for total, seed, at, _ in rows]
    assert shared.tolist() == [max(1, total * int(share * 2**31) >> 31) for total, _, _, share in rows]


@triton.jit
def _search_each(entries, length, floor, wanted, cuts, BY_COUNT: tl.constexpr, BLOCK: tl.constexpr):
    case = tl.program_id(0)
    cut = _find_cut(entries, length, floor + 0 * case, tl.load(wanted + case), BY_COUNT, BLOCK)
    tl.store(cuts + case, cut)


@triton.jit
def _entry_each(entries, length, targets, found, BLOCK: tl.constexpr):
    case = tl.program_id(0)
    target = tl.load(targets + case)
    tl.store(found + case, _entry_at(entries, length, tl.full((), 1, tl.int32), target, BLOCK))


@pytest.mark.parametrize("by_count", [True, False])
def test_a_cut_is_found_among_neighbouring_bit_patterns(by_count, device):
    """Weights that differ in their last bit, ties among them: the cut is the sorted list's, for sums that
    are just reached and just missed."""
    one = 0x3F800000
    entries = torch.tensor([one, one - 1, one - 2, one - 2, one - 3, one - 9, one - 9, one - (1 << 23)] * 2)
    entries = entries[torch.randperm(16, generator=torch.Generator().manual_seed(9))].to(torch.int32)
    ordered = entries.sort(descending=True).values
    amounts = torch.ones(16, dtype=torch.int64) if by_count else sampling._units(ordered.view(torch.float32))
    summed = amounts.cumsum(0)
    wanted = torch.cat((summed, summed[:-1] + 1))
    expected = ordered[torch.searchsorted(summed, wanted)]
    cuts = torch.empty(len(wanted), dtype=torch.int32, device=device)
    floor = one - (2 << 23)
    _search_each[(len(wanted),)](
        entries.to(device), 16, floor, wanted.to(device), cuts, BY_COUNT=by_count, BLOCK=16
    )
    # Where the least weight of all is enough, so is any cut below it.
    assert cuts.clamp_min(int(ordered[-1])).tolist() == expected.tolist()


def test_an_entry_is_the_first_whose_sum_exceeds_the_target(device):
    """At a sum exactly, and a unit to either side of it; entries of weight 0 are passed over."""
    weights = torch.tensor([0.0, 1.0, 0.0, 0.25, 0.25, 0.0, 1.0, 0.5, 0.0])
    summed = sampling._units(weights).cumsum(0)
    targets = torch.cat((summed - 1, summed, summed + 1))
    targets = targets[(targets >= 0) & (targets < summed[-1])]
    found = torch.empty(len(targets), dtype=torch.int32, device=device)
    _entry_each[(len(targets),)](weights.view(torch.int32).to(device), 9, targets.to(device), found, BLOCK=4)
    assert found.tolist() == torch.searchsorted(summed, targets, right=True).tolist()
