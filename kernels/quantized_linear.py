"""Linear layers whose weights, or weights and activations, are stored in fewer bits.

    W8A16   W[n, i] = s[n] q[n, i]                     q int8, round(W / s), s[n] = max_i |W[n, i]| / 127
    W4A16   W[n, i] = s[g, n] (q[n, i] - z[g, n])      q in 0..15, g = i // 128
    FP8     W[n, i] = s[n] q[n, i],  x[t, i] = r[t] p[t, i]       as kernels.row_quantization's e4m3

    linear(x) = x W^T

W4A16 is asymmetric round-to-nearest as in AWQ (Lin et al. 2023, eq. 1). Its weight keeps two values in a
byte: byte j of a group holds value j in its low half and value j + 64 in its high half, so that either half
is a contiguous run of the inputs. Its scales and zeros are [in / 128, out], because a tile of outputs needs
those of one group at a time.

For few rows the GPU's kernels read the narrow weights once; for more rows than they hold the library
is faster, on weights widened first (W8A16, W4A16) or as they are (FP8).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from kernels.dispatch import choose
from kernels.row_quantization import quantize_rows

GROUP = 128  # inputs that share a scale in W4A16
_INT4_MAX = 15
# Outputs that have a counter together: no kernel's tile is smaller.
_COUNTED = 16


@dataclass(frozen=True, slots=True, eq=False)
class Weight:
    """What the formats share. `arrivals` are counters that a GPU kernel leaves at zero, as it finds them;
    they are the weight's own, so that two layers on two streams do not meet."""

    data: torch.Tensor  # [out, ...]
    arrivals: torch.Tensor = field(init=False)  # int32 [out / 16]

    def __post_init__(self) -> None:
        counters = torch.zeros(-(-len(self.data) // _COUNTED), dtype=torch.int32, device=self.data.device)
        object.__setattr__(self, "arrivals", counters)


@dataclass(frozen=True, slots=True, eq=False)
class Int8Weight(Weight):
    """W8A16: `data` int8 [out, in]."""

    scale: torch.Tensor  # float32 [out]


@dataclass(frozen=True, slots=True, eq=False)
class Int4Weight(Weight):
    """W4A16: `data` uint8 [out, in / 2]."""

    scale: torch.Tensor  # [in / GROUP, out], in the dtype of the weight it was made of
    zero: torch.Tensor  # uint8 [in / GROUP, out], 0..15


@dataclass(frozen=True, slots=True, eq=False)
class Fp8Weight(Weight):
    """FP8: `data` float8_e4m3fn [out, in]."""

    scale: torch.Tensor  # float32 [out]


def quantize_int8(weight: torch.Tensor) -> Int8Weight:
    """weight [out, in]; each value is off by at most half a step, scale / 2."""
    return Int8Weight(*quantize_rows(weight, torch.int8))


def quantize_int4(weight: torch.Tensor) -> Int4Weight:
    """weight [out, in], `in` a multiple of GROUP; off by at most a step (scale and zero are rounded)."""
    outputs, inputs = weight.shape
    if inputs % GROUP:
        raise ValueError(f"W4A16 needs inputs in multiples of {GROUP}; this weight has {inputs}")
    grouped = weight.float().view(outputs, inputs // GROUP, GROUP)
    low, high = grouped.amin(dim=2).clamp_max(0), grouped.amax(dim=2).clamp_min(0)
    least = torch.finfo(weight.dtype).tiny  # scales are kept in the weight's dtype: no subnormals
    scale = ((high - low) / _INT4_MAX).clamp_min(least).to(weight.dtype)
    zero = (-low / scale.float()).round().clamp(0, _INT4_MAX)
    values = (grouped / scale.float()[:, :, None] + zero[:, :, None]).round().clamp(0, _INT4_MAX)
    packed = pack_int4(values.to(torch.uint8).view(outputs, inputs))
    return Int4Weight(packed, scale.T.contiguous(), zero.to(torch.uint8).T.contiguous())


def quantize_fp8(weight: torch.Tensor) -> Fp8Weight:
    """weight [out, in]; each value has e4m3's relative precision, 2**-4, down to its subnormals."""
    return Fp8Weight(*quantize_rows(weight, torch.float8_e4m3fn))


def pack_int4(values: torch.Tensor) -> torch.Tensor:
    """uint8 [out, in] of 0..15 -> uint8 [out, in / 2], two a byte."""
    low, high = values.view(len(values), -1, 2, GROUP // 2).unbind(dim=2)
    return (low | (high << 4)).reshape(len(values), -1)


def unpack_int4(packed: torch.Tensor) -> torch.Tensor:
    """`pack_int4` undone."""
    grouped = packed.view(len(packed), -1, GROUP // 2)
    return torch.stack((grouped & _INT4_MAX, grouped >> 4), dim=2).view(len(packed), -1)


def int8_linear(x: torch.Tensor, weight: Int8Weight) -> torch.Tensor:
    """x [T, in], bfloat16 or float16 on a GPU -> [T, out] in x's dtype."""
    return choose(x, int8_linear_torch, "kernels.gpu.quantized_linear:int8_linear")(x, weight)


def int4_linear(x: torch.Tensor, weight: Int4Weight) -> torch.Tensor:
    """x [T, in], bfloat16 or float16 on a GPU -> [T, out] in x's dtype."""
    return choose(x, int4_linear_torch, "kernels.gpu.quantized_linear:int4_linear")(x, weight)


def fp8_linear(x: torch.Tensor, weight: Fp8Weight) -> torch.Tensor:
    """x [T, in], bfloat16 or float16 on a GPU -> [T, out] in x's dtype; x is rounded to e4m3 row by row."""
    return choose(x, fp8_linear_torch, "kernels.gpu.quantized_linear:fp8_linear")(x, weight)


def fp8_product(
    rows: torch.Tensor, row_scale: torch.Tensor, weight: Fp8Weight, dtype: torch.dtype
) -> torch.Tensor:
    """`fp8_linear` of rows [T, in] that are in e4m3 already, with row_scale [T] -> [T, out] in `dtype`."""
    product = choose(rows, fp8_product_torch, "kernels.gpu.quantized_linear:fp8_product")
    return product(rows, row_scale, weight, dtype)


def dequantize_int8(weight: Int8Weight, dtype: torch.dtype) -> torch.Tensor:
    """[out, in]."""
    return (weight.data.to(_wide(dtype)) * weight.scale[:, None]).to(dtype)


def dequantize_int4(weight: Int4Weight, dtype: torch.dtype) -> torch.Tensor:
    """[out, in]."""
    values = unpack_int4(weight.data).view(len(weight.data), -1, GROUP).to(_wide(dtype))
    scale, zero = weight.scale.T[:, :, None], weight.zero.T[:, :, None]
    return ((values - zero) * scale).view(len(values), -1).to(dtype)


def dequantize_fp8(weight: Fp8Weight, dtype: torch.dtype) -> torch.Tensor:
    """[out, in]."""
    return (weight.data.to(_wide(dtype)) * weight.scale[:, None]).to(dtype)


def linear_reference(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x W^T in float64; `weight` [out, in] as dequantised to float64, x as the product sees it."""
    return x.double() @ weight.double().T


def fp8_linear_reference(x: torch.Tensor, weight: Fp8Weight) -> torch.Tensor:
    """The formula in float64, the rounding of x included."""
    rows, scale = quantize_rows(x, torch.float8_e4m3fn)
    return linear_reference(rows.double() * scale.double()[:, None], dequantize_fp8(weight, torch.float64))


def int8_linear_torch(x: torch.Tensor, weight: Int8Weight) -> torch.Tensor:
    """`int8_linear` on widened weights."""
    return F.linear(x, dequantize_int8(weight, x.dtype))


def int4_linear_torch(x: torch.Tensor, weight: Int4Weight) -> torch.Tensor:
    """`int4_linear` on widened weights."""
    return F.linear(x, dequantize_int4(weight, x.dtype))


def fp8_linear_torch(x: torch.Tensor, weight: Fp8Weight) -> torch.Tensor:
    """`fp8_linear` on widened operands."""
    return fp8_product_torch(*quantize_rows(x, torch.float8_e4m3fn), weight, x.dtype)


def fp8_product_torch(
    rows: torch.Tensor, row_scale: torch.Tensor, weight: Fp8Weight, dtype: torch.dtype
) -> torch.Tensor:
    """`fp8_product` on widened operands."""
    return F.linear((rows.float() * row_scale[:, None]).to(dtype), dequantize_fp8(weight, dtype))


def _wide(dtype: torch.dtype) -> torch.dtype:
    """What to compute in before rounding to `dtype`."""
    return torch.promote_types(dtype, torch.float32)
