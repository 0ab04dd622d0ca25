"""Matrix products with a model's constant weights.

    linear(x) = x W^T                                                  W [out, in]

On CPU the weight is laid out once in oneDNN's blocked format: torch's own path reorders it at every
call, which costs more than the product itself at the few rows a decode step has.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

# Rows oneDNN is told to expect when it picks the layout; it serves any number of rows.
_TYPICAL_ROWS = 32


@dataclass(frozen=True, slots=True, eq=False)
class PackedWeight:
    """A weight [out, in], opaque to its holder; `nbytes` is its memory."""

    data: torch.Tensor
    nbytes: int
    blocked: bool


def pack_weight(weight: torch.Tensor) -> PackedWeight:
    """`weight` [out, in] in the layout `linear` is fastest with."""
    blocked = _onednn_serves(weight)
    if blocked:
        weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _TYPICAL_ROWS)
    return PackedWeight(weight, weight.element_size() * weight.numel(), blocked)


def linear(x: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    """x [T, in] -> [T, out] in x's dtype."""
    if weight.blocked:
        return torch.ops.mkldnn._linear_pointwise(x, weight.data, None, "none", [], "")
    return F.linear(x, weight.data)


def _onednn_serves(weight: torch.Tensor) -> bool:
    return (
        weight.device.type == "cpu"
        and weight.dtype in (torch.float32, torch.bfloat16)
        and torch.backends.mkldnn.is_available()
    )
