"""Rows in eight bits, each with a scale of its own: what a quantised linear layer takes in.

    scale[t] = max_i |x[t, i]| / Q,    q[t, i] = round(x[t, i] / scale[t])        Q = 448 (e4m3), 127 (int8)

e4m3 is Micikevicius et al. 2022's; both round to nearest, ties to even. The scale of a row with a value
that is not finite is NaN, so that a broken row stays broken in a format that knows no NaN.
"""

from __future__ import annotations

import torch

LARGEST = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}
# The least scale, so that a row of zeros has one.
SCALE_MIN = 1e-12


def quantize_rows(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """x [T, d] -> (x in `dtype` [T, d], scale float32 [T]). Raises KeyError unless e4m3 or int8."""
    largest, wide = LARGEST[dtype], x.float()
    scale = (wide.abs().amax(dim=-1) / largest).clamp_min(SCALE_MIN)
    scale = torch.where(scale.isfinite(), scale, torch.nan)
    scaled = (wide / scale[:, None]).clamp(-largest, largest)
    return (scaled.nan_to_num(0).round() if dtype is torch.int8 else scaled).to(dtype), scale
