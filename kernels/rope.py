"""Rotary position embedding, in Llama's half-rotation layout.

    out[i]       = x[i] cos(p w_i) - x[i + D/2] sin(p w_i)            i < D/2
    out[i + D/2] = x[i + D/2] cos(p w_i) + x[i] sin(p w_i)            w_i = theta^(-2i/D)

(Su et al. 2021, eq. 34, with pairs (i, i + D/2) instead of neighbours.) Scaling changes the
frequencies w only: "linear" divides them by `factor` (Chen et al. 2023); "llama3" does so for
wavelengths beyond original/low_freq_factor, keeps those below original/high_freq_factor, and
blends between (Llama 3.1 release).
"""

from __future__ import annotations

import math

import torch

from kernels.dispatch import choose


def rope_frequencies(head_dim: int, theta: float) -> torch.Tensor:
    """w, float32 [D/2], in radians a position."""
    return 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)


def scale_linear(frequencies: torch.Tensor, factor: float) -> torch.Tensor:
    """Frequencies of a context stretched evenly by `factor`."""
    return frequencies / factor


def scale_llama3(
    frequencies: torch.Tensor,
    *,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_context_tokens: int,
) -> torch.Tensor:
    """Frequencies of a context stretched by `factor` at long wavelengths only."""
    turns = original_context_tokens * frequencies / (2 * math.pi)  # in the original context
    keep = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0, 1)
    return frequencies * (keep + (1 - keep) / factor)


def rope_table(positions: torch.Tensor, frequencies: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(cos, signed sin) of a step's positions [T], each float32 [T, 1, D]; shared by all layers.

    The first half of sin is negated, so that a rotation is `x * cos + swap_halves(x) * sin`.
    """
    angles = positions.float()[:, None, None] * frequencies
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x [T, heads, D] rotated by `rope_table`'s rows; computed in float32, returned in x's dtype."""
    return choose(x, _apply_rope_torch)(x, cos, sin)


def apply_rope_reference(x: torch.Tensor, positions: torch.Tensor, frequencies: torch.Tensor) -> torch.Tensor:
    """The formula as a multiplication of complex numbers, in float64."""
    first, second = x.double().chunk(2, dim=-1)
    angles = positions.double()[:, None, None] * frequencies.double()
    rotated = torch.complex(first, second) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((rotated.real, rotated.imag), dim=-1).to(x.dtype)


def _apply_rope_torch(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    swapped = x.roll(x.shape[-1] // 2, dims=-1)
    return torch.addcmul(x * cos, swapped, sin).to(x.dtype)
