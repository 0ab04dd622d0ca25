"""RMSNorm, alone and fused with the residual add before it.

    rms_norm(x)_i = x_i / sqrt(mean_j x_j^2 + eps) * weight_i        (Zhang & Sennrich 2019, eq. 4)

The mean is taken in float32 whatever the dtype of x. The `_quantized` ops give rows as
`kernels.row_quantization` says, of the norm before it is rounded to x's dtype.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kernels.dispatch import choose
from kernels.row_quantization import quantize_rows


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [T, d], weight [d] -> [T, d] in x's dtype."""
    return choose(x, _rms_norm_torch, "kernels.gpu.rms_norm:rms_norm")(x, weight, eps)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rms_norm(x + residual), x + residual), each [T, d]; `residual` is overwritten by the sum."""
    op = choose(x, _add_rms_norm_torch, "kernels.gpu.rms_norm:add_rms_norm")
    return op(x, residual, weight, eps)


def rms_norm_quantized(
    x: torch.Tensor, weight: torch.Tensor, eps: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rms_norm(x) [T, d] in `dtype`, its scale float32 [T])."""
    op = choose(x, _rms_norm_quantized_torch, "kernels.gpu.rms_norm:rms_norm_quantized")
    return op(x, weight, eps, dtype)


def add_rms_norm_quantized(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(rms_norm(x + residual) in `dtype`, its scale, x + residual); `residual` is overwritten."""
    op = choose(x, _add_rms_norm_quantized_torch, "kernels.gpu.rms_norm:add_rms_norm_quantized")
    return op(x, residual, weight, eps, dtype)


def rms_norm_reference(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """The formula, in float64."""
    wide = x.double()
    return (wide / (wide.square().mean(dim=-1, keepdim=True) + eps).sqrt() * weight.double()).to(x.dtype)


def _rms_norm_torch(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def _add_rms_norm_torch(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    residual += x
    return _rms_norm_torch(residual, weight, eps), residual


def _rms_norm_quantized_torch(
    x: torch.Tensor, weight: torch.Tensor, eps: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    return quantize_rows(_rms_norm_torch(x.float(), weight.float(), eps), dtype)


def _add_rms_norm_quantized_torch(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    residual += x
    return *_rms_norm_quantized_torch(residual, weight, eps, dtype), residual
