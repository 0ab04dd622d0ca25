"""From logits to one token a row.

The order is vLLM's: penalties, bitmask, temperature, min-p, top-k, top-p; each cut is taken on what the one
before left, and top-p on its sum.

    penalties   l = (l / r if l > 0 else l r) - frequency * count - presence * (count > 0)
                r is the repetition penalty (Keskar et al. 2019), for tokens of the prompt or the output;
                count is of the output alone
    min-p       keeps tokens with p >= min_p * max p              (Nguyen et al. 2024)
    top-k       keeps tokens with p >= the k-th largest p         (Fan et al. 2018)
    top-p       keeps the most likely tokens up to the one at which their sum reaches top_p of all
                                                                  (Holtzman et al. 2020)

Tokens tied at a cut are all kept. What is left is drawn by inverting the cumulative distribution, in token
order, at a uniform number that is a hash of (seed, position).

Every path gives the same token for the same logits, on any device, in any batch, however the work is cut:
a token's weight is a float32 made of correctly rounded operations only (no fused multiply-add), and sums
are of integers, in units of UNIT:

    w = exp2((l - max l) * (log2(e) / temperature))     `exp2` below, 0 beneath UNIT
    sum = sum of floor(w / UNIT)

So tokens 2^40 times less likely than the first are never drawn, and tokens are tied where w is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from kernels.dispatch import choose

UNIT_BITS = 40
UNIT = 2.0**-UNIT_BITS
LOG2E = math.log2(math.e)
MIN_TEMPERATURE = 1e-30
# exp2 on [-1/2, 1/2]: a least-squares fit of the relative error, within one float32 rounding of the truth.
EXP2 = (0.6931471824645996, 0.24022647738456726, 0.05550329014658928, 0.009618373587727547,
        0.0013399848248809576, 0.00015370704932138324)  # fmt: skip
# SplitMix64 (Steele, Lea & Flood 2014), as the engine's host side has it.
GOLDEN = 0x9E3779B97F4A7C15
MIX_FIRST = 0xBF58476D1CE4E5B9
MIX_SECOND = 0x94D049BB133111EB
_WORD = (1 << 64) - 1
# A share of a sum is taken in units of 2^-31, so that integers of 64 bits hold it.
SHARE_BITS = 31


@dataclass(frozen=True, slots=True, eq=False)
class SamplingControls:
    """What S rows ask for, on their logits' device. A row of temperature 0 takes its largest logit."""

    temperature: torch.Tensor  # float32 [S]
    top_k: torch.Tensor  # int32 [S]; 0 is off
    top_p: torch.Tensor  # float32 [S]; 1 is off
    min_p: torch.Tensor  # float32 [S]; 0 is off
    seed: torch.Tensor  # int64 [S], the bits of an unsigned seed
    position: torch.Tensor  # int32 [S] of the token to be drawn
    is_greedy: bool = False  # the host knows that every temperature is 0


@dataclass(frozen=True, slots=True, eq=False)
class Penalties:
    """Lists of the distinct tokens that each row has seen: far shorter than a count for all V."""

    token_ids: torch.Tensor  # int32 [S, P]; -1 fills up
    counts: torch.Tensor  # int32 [S, P] in the output; 0 for a token of the prompt alone
    repetition: torch.Tensor  # float32 [S]; 1 is off
    frequency: torch.Tensor  # float32 [S]; 0 is off
    presence: torch.Tensor  # float32 [S]; 0 is off


def sample(
    logits: torch.Tensor,
    controls: SamplingControls,
    penalties: Penalties | None = None,
    allowed: torch.Tensor | None = None,
) -> torch.Tensor:
    """One token a row of float32 logits [S, V], int32 [S]; the lowest id where the largest are tied.

    `allowed` int32 [S, ceil(V / 32)] has bit i % 32 of word i // 32 set where token i may be drawn. A row
    with a NaN or an infinity, or without an allowed token, gets -1. Penalties are applied in place.
    """
    op = choose(logits, _sample_torch, "kernels.gpu.sampling:sample")
    return op(logits, controls, penalties, allowed)


def distribution_reference(
    logits: torch.Tensor, temperature: float, top_k: int, top_p: float, min_p: float
) -> torch.Tensor:
    """What one row [V] is drawn from, by the definitions above, in float64."""
    if temperature == 0:
        return torch.nn.functional.one_hot(logits.argmax(), len(logits)).double()
    p = (logits.double() / temperature).softmax(dim=0)
    p[p < min_p * p.max()] = 0
    if 0 < top_k < len(p):
        p[p < p.sort(descending=True).values[top_k - 1]] = 0
    if top_p < 1:
        ordered = p.sort(descending=True).values
        reached = ordered.cumsum(dim=0) >= top_p * p.sum()
        p[p < ordered[int(reached.byte().argmax())]] = 0
    return p / p.sum()


def random_bits(seed: int, position: int) -> int:
    """48 bits: output number `position` of SplitMix64 started at a mix of the seed."""
    return _mix(_mix(seed + GOLDEN) + (position + 1) * GOLDEN) >> 16


def penalize(logits: torch.Tensor, penalties: Penalties) -> None:
    """Apply `penalties` to logits [S, V] in place."""
    row, entry = (penalties.token_ids >= 0).nonzero(as_tuple=True)
    token, count = penalties.token_ids[row, entry].long(), penalties.counts[row, entry]
    before, repetition = logits[row, token], penalties.repetition[row]
    repeated = torch.where(before > 0, before / repetition, before * repetition)
    logits[row, token] = repeated - penalties.frequency[row] * count - penalties.presence[row] * (count > 0)


def weigh(logits: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    """w, float32 [S, V]; each operation is rounded once, here as on a GPU."""
    log2e = torch.tensor(LOG2E, dtype=torch.float32, device=logits.device)
    scale = log2e / temperature.clamp_min(MIN_TEMPERATURE)
    exponent = (logits - logits.amax(dim=-1, keepdim=True)) * scale[:, None]
    lowest = float(-UNIT_BITS - 1)
    exponent = torch.where(exponent > lowest, exponent, lowest)
    whole = (exponent + 0.5).floor()
    rest = exponent - whole
    power = torch.full_like(rest, EXP2[-1])
    for coefficient in (*EXP2[-2::-1], 1.0):
        power = power * rest + coefficient
    weight = power * ((whole.int() + 127) << 23).view(torch.float32)  # 2^whole
    return torch.where(weight >= UNIT, weight, 0.0)


def _sample_torch(
    logits: torch.Tensor,
    controls: SamplingControls,
    penalties: Penalties | None,
    allowed: torch.Tensor | None,
) -> torch.Tensor:
    if penalties is not None:
        penalize(logits, penalties)
    is_sound = logits.isfinite().all(dim=-1)
    if allowed is not None:
        bits = torch.arange(32, dtype=torch.int32, device=logits.device)
        permitted = ((allowed[:, :, None] >> bits) & 1).flatten(1)[:, : logits.shape[1]].bool()
        logits = logits.masked_fill(~permitted, float("-inf"))
        is_sound &= permitted.any(dim=-1)
    drawn = torch.where(controls.temperature > 0, _draw(logits, controls), logits.argmax(dim=-1))
    return torch.where(is_sound, drawn, -1).to(torch.int32)


def _draw(logits: torch.Tensor, controls: SamplingControls) -> torch.Tensor:
    vocab = logits.shape[1]
    weights = weigh(logits, controls.temperature)
    weights = torch.where(weights >= controls.min_p[:, None], weights, 0.0)
    ordered = weights.sort(dim=-1, descending=True).values
    is_limited = (controls.top_k > 0) & (controls.top_k < vocab)
    last = torch.where(is_limited, controls.top_k, vocab).long() - 1
    kth = ordered.gather(1, last[:, None])
    summed = torch.where(ordered >= kth, _units(ordered), 0).cumsum(dim=-1)
    wanted = _share(summed[:, -1:], controls.top_p[:, None])
    end = ordered.gather(1, torch.searchsorted(summed, wanted).clamp_max(vocab - 1))
    cut = torch.where(controls.top_p[:, None] < 1, end, kth)
    cumulative = torch.where(weights >= cut, _units(weights), 0).cumsum(dim=-1)
    rows = zip(controls.seed.tolist(), controls.position.tolist(), cumulative[:, -1].tolist(), strict=True)
    targets = [random_bits(seed, position) * total >> 48 for seed, position, total in rows]
    target = torch.tensor(targets, dtype=torch.int64, device=logits.device)
    return torch.searchsorted(cumulative, target[:, None], right=True).squeeze(1).clamp_max(vocab - 1)


def _units(weights: torch.Tensor) -> torch.Tensor:
    return (weights * 2.0**UNIT_BITS).long()


def _share(total: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """max(1, floor(total * share)) of a total below 2^62, in integers."""
    parts = (share.clamp(0, 1) * 2.0**SHARE_BITS).long()
    high, low = total >> 32, total & 0xFFFFFFFF
    return (parts * high * 2 + (parts * low >> SHARE_BITS)).clamp_min(1)


def _mix(state: int) -> int:
    state &= _WORD
    state = ((state ^ (state >> 30)) * MIX_FIRST) & _WORD
    state = ((state ^ (state >> 27)) * MIX_SECOND) & _WORD
    return state ^ (state >> 31)
