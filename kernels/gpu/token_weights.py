"""The arithmetic of `kernels.sampling` inside kernels: weights, integer sums, shares of them, random numbers.

Kernels that use it are launched with `enable_fp_fusion=False`: a multiply-add rounded once instead of twice
would make other weights than the reference's.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels import sampling

_UNIT_BITS = tl.constexpr(sampling.UNIT_BITS)
_UNITS = tl.constexpr(2.0**sampling.UNIT_BITS)
_LEAST = tl.constexpr(sampling.UNIT)
_LOG2E = tl.constexpr(sampling.LOG2E)
_MIN_TEMPERATURE = tl.constexpr(sampling.MIN_TEMPERATURE)
_SHARE_BITS = tl.constexpr(sampling.SHARE_BITS)
_SHARES = tl.constexpr(2.0**sampling.SHARE_BITS)
_E1, _E2, _E3, _E4, _E5, _E6 = (tl.constexpr(coefficient) for coefficient in sampling.EXP2)
_GOLDEN = tl.constexpr(sampling.GOLDEN)
_MIX_FIRST = tl.constexpr(sampling.MIX_FIRST)
_MIX_SECOND = tl.constexpr(sampling.MIX_SECOND)


@triton.jit
def load_logits(logits, allowed, at, vocab, MASKED: tl.constexpr):
    """Logits of one row at token ids `at`, and whether each exists and is allowed."""
    inside = at < vocab
    values = tl.load(logits + at, mask=inside, other=0.0)
    if MASKED:
        word = tl.load(allowed + at // 32, mask=inside, other=0)
        return values, inside & (((word >> (at % 32)) & 1) != 0)
    else:
        return values, inside


@triton.jit
def weigh(values, usable, largest, temperature, min_p):
    """The bits of tokens' weights, int32: as floats they are not negative, so their order is the weights'."""
    scale = tl.div_rn(tl.full((), _LOG2E, tl.float32), tl.maximum(temperature, _MIN_TEMPERATURE))
    exponent = (values - largest) * scale
    lowest = -1.0 * (_UNIT_BITS + 1)
    # Not finite: the row is refused, and what is computed for it must only be harmless.
    exponent = tl.minimum(tl.where(exponent > lowest, exponent, lowest), 0.0)
    whole = tl.floor(exponent + 0.5)
    rest = exponent - whole
    power = rest * _E6 + _E5
    power = power * rest + _E4
    power = power * rest + _E3
    power = power * rest + _E2
    power = power * rest + _E1
    power = power * rest + 1.0
    weight = power * ((whole.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    kept = usable & (weight >= _LEAST) & (weight >= min_p)
    return tl.where(kept, weight, 0.0).to(tl.int32, bitcast=True)


@triton.jit
def units(bits):
    """Weights, by their bits, as whole multiples of the unit: int64."""
    return (bits.to(tl.float32, bitcast=True) * _UNITS).to(tl.int64)


@triton.jit
def share_of(total, share):
    """max(1, floor(total * share))."""
    part = (tl.minimum(tl.maximum(share, 0.0), 1.0) * _SHARES).to(tl.int64)
    high, low = total >> 32, total & 0xFFFFFFFF
    return tl.maximum(part * high * 2 + ((part * low) >> _SHARE_BITS), 1)


@triton.jit
def random_part_of(total, seed, position):
    """floor(total * u), u the random number of (seed, position) in [0, 1)."""
    state = _mix(seed.to(tl.uint64) + _GOLDEN) + (position.to(tl.uint64) + 1) * _GOLDEN
    number = (_mix(state) >> 16) << 16  # u in units of 2^-64
    return tl.umulhi(number, total.to(tl.uint64)).to(tl.int64)


@triton.jit
def _mix(state):
    state = (state ^ (state >> 30)) * _MIX_FIRST
    state = (state ^ (state >> 27)) * _MIX_SECOND
    return state ^ (state >> 31)
