"""What the tests of the native library share: the library, or the reason to skip."""

from __future__ import annotations

import ctypes

import pytest
import torch

from kernels.cpu import library
from kernels.cpu.packing import GROUP

needs_library = pytest.mark.skipif(
    library.unsupported() is not None, reason=f"no native library: {library.unsupported()}"
)


def built() -> ctypes.CDLL:
    """Compiled on the first call on a machine (about ten seconds), cached after it."""
    return library.build()


def rounded(x: torch.Tensor, precision: str) -> torch.Tensor:
    """Activations as the products see them."""
    if precision == "bf16":
        return x.bfloat16().float()
    grouped = x.reshape(len(x), -1, GROUP)
    scale = grouped.abs().amax(-1, keepdim=True) / 127
    return (grouped / scale.clamp_min(1e-30)).round().mul(scale).reshape(x.shape)
