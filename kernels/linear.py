"""Matrix products with a model's constant weights.

    linear(x) = x W^T                                                  W [out, in]

On CPU a plain weight is laid out once in oneDNN's blocked format: torch's own path reorders it at every
call, which costs more than the product itself at the few rows a decode step has. The narrow formats are
`kernels.quantized_linear`'s.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Literal

import torch
import torch.nn.functional as F

from kernels.quantized_linear import (
    Fp8Weight,
    Int4Weight,
    Int8Weight,
    fp8_linear,
    int4_linear,
    int8_linear,
    quantize_fp8,
    quantize_int4,
    quantize_int8,
)

WeightFormat = Literal["plain", "int8", "int4", "float8"]

Narrow = Int8Weight | Int4Weight | Fp8Weight
_QUANTIZE: dict[str, Callable[[torch.Tensor], Narrow]] = {
    "int8": quantize_int8,
    "int4": quantize_int4,
    "float8": quantize_fp8,
}
# Rows oneDNN is told to expect when it picks the layout; it serves any number of rows.
_TYPICAL_ROWS = 32


@dataclass(frozen=True, slots=True, eq=False)
class PackedWeight:
    """A weight [out, in], opaque to its holder; `nbytes` is its memory, `num_values` out * in."""

    data: torch.Tensor | Narrow
    nbytes: int
    num_values: int
    blocked: bool = False


def pack_weight(weight: torch.Tensor, weight_format: WeightFormat = "plain") -> PackedWeight:
    """`weight` [out, in] in the layout `linear` is fastest with; "plain" keeps its dtype.

    Raises ValueError where the format cannot hold it: int4 has groups of 128 inputs.
    """
    values = weight.numel()
    if weight_format != "plain":
        narrow = _QUANTIZE[weight_format](weight)
        parts = (getattr(narrow, field.name) for field in fields(narrow) if field.name != "arrivals")
        return PackedWeight(narrow, sum(part.nbytes for part in parts), values)
    blocked = _onednn_serves(weight)
    if blocked:
        weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _TYPICAL_ROWS)
    return PackedWeight(weight, weight.element_size() * weight.numel(), values, blocked)


def linear(x: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    """x [T, in] -> [T, out] in x's dtype."""
    match weight.data:
        case torch.Tensor() as data:
            if weight.blocked:
                return torch.ops.mkldnn._linear_pointwise(x, data, None, "none", [], "")
            return F.linear(x, data)
        case Int8Weight() as data:
            return int8_linear(x, data)
        case Int4Weight() as data:
            return int4_linear(x, data)
        case Fp8Weight() as data:
            return fp8_linear(x, data)


def _onednn_serves(weight: torch.Tensor) -> bool:
    return (
        weight.device.type == "cpu"
        and weight.dtype in (torch.float32, torch.bfloat16)
        and torch.backends.mkldnn.is_available()
    )
