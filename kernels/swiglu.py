"""SwiGLU's gate on a fused gate/up projection.

    swiglu([gate, up]) = gate * sigmoid(gate) * up                     (Shazeer 2020, eq. 6)

`swiglu_quantized` gives rows as `kernels.row_quantization` says.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kernels.dispatch import choose
from kernels.row_quantization import quantize_rows


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """gate_up [T, 2f], gate in the first half -> [T, f]."""
    return choose(gate_up, _swiglu_torch, "kernels.gpu.swiglu:swiglu")(gate_up)


def swiglu_quantized(gate_up: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """(swiglu(gate_up) [T, f] in `dtype`, its scale float32 [T])."""
    op = choose(gate_up, _swiglu_quantized_torch, "kernels.gpu.swiglu:swiglu_quantized")
    return op(gate_up, dtype)


def swiglu_reference(gate_up: torch.Tensor) -> torch.Tensor:
    """The formula, in float64."""
    gate, up = gate_up.double().chunk(2, dim=-1)
    return (gate / (1 + torch.exp(-gate)) * up).to(gate_up.dtype)


def _swiglu_torch(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def _swiglu_quantized_torch(gate_up: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    return quantize_rows(_swiglu_torch(gate_up.float()), dtype)
