"""Eight-bit rounding inside other kernels; formulas in `kernels.row_quantization`.

e4m3 is made with integer arithmetic, not by the GPU's conversion: sm_80 has none, and Triton's interpreter
rounds wrongly where a carry reaches the exponent. These kernels wait for memory, so it costs no time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.row_quantization import LARGEST, SCALE_MIN

_SCALE_MIN = tl.constexpr(SCALE_MIN)
_E4M3_MAX = tl.constexpr(LARGEST[torch.float8_e4m3fn])
_INT8_MAX = tl.constexpr(LARGEST[torch.int8])
# Added to a float32, its last mantissa bit weighs 1: the sum is rounded to an integer, ties to even.
_ROUND = tl.constexpr(1.5 * 2.0**23)
_EXPONENT_GAP = tl.constexpr((127 - 7) << 3)  # float32's exponent bias less e4m3's
_LEAST_NORMAL = tl.constexpr(2.0**-6)
_SUBNORMALS = tl.constexpr(2.0**9)  # a unit
_NAN = tl.constexpr(0x7F)


@triton.jit
def e4m3_bits(x):
    """float32 -> the bits (uint8) of the nearest e4m3, ties to even; beyond 448 is 448, NaN stays NaN."""
    # Not tl.minimum: it would turn NaN into 448, which the last line expects to do itself.
    magnitude = tl.minimum(tl.abs(x), _E4M3_MAX)
    bits = magnitude.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - _EXPONENT_GAP
    subnormal = ((magnitude * _SUBNORMALS + _ROUND) - _ROUND).to(tl.int32)
    code = tl.where(magnitude < _LEAST_NORMAL, subnormal, normal)
    code = tl.where(x == x, code, _NAN)
    return (code | ((x.to(tl.int32, bitcast=True) >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def row_scale(x, INT8: tl.constexpr):
    """Scales [R] of float32 rows [R, N], whose masked entries are 0."""
    largest = tl.max(tl.abs(x), axis=1)
    scale = tl.maximum(largest / (_INT8_MAX if INT8 else _E4M3_MAX), _SCALE_MIN)
    # A maximum may pass over NaN; a sum does not, and x * 0 is NaN where x is not finite.
    return scale + tl.sum(x * 0.0, axis=1)


@triton.jit
def quantize(x, scale, INT8: tl.constexpr):
    """float32 [R, N] over scale [R], in int8 or as e4m3's bits."""
    scaled = tl.div_rn(x, tl.broadcast_to(scale[:, None], x.shape))
    if INT8:
        scaled = tl.minimum(tl.maximum(scaled, -_INT8_MAX), _INT8_MAX)
        return ((tl.where(scaled == scaled, scaled, 0.0) + _ROUND) - _ROUND).to(tl.int8)
    else:
        return e4m3_bits(scaled)


def raw(x: torch.Tensor) -> torch.Tensor:
    """e4m3 as the bytes that kernels store; int8 as it is. Raises KeyError for another dtype."""
    assert LARGEST[x.dtype]
    return x.view(torch.uint8) if x.dtype is torch.float8_e4m3fn else x
