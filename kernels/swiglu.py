"""SwiGLU's gate on a fused gate/up projection.

swiglu([gate, up]) = gate * sigmoid(gate) * up                     (Shazeer 2020, eq. 6)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kernels.dispatch import choose


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """gate_up [T, 2f], gate in the first half -> [T, f]."""
    return choose(gate_up, _swiglu_torch)(gate_up)


def swiglu_reference(gate_up: torch.Tensor) -> torch.Tensor:
    """The formula, in float64."""
    gate, up = gate_up.double().chunk(2, dim=-1)
    return (gate / (1 + torch.exp(-gate)) * up).to(gate_up.dtype)


def _swiglu_torch(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)
