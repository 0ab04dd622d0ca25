"""Weights that no file holds: drawn on the device they are for, to measure an engine without its model.

    matrix [out, in]   normal, of deviation 1/√in, so that activations and logits keep their size
    vector             ones

A tensor depends on its name and the seed alone: not on its dtype's neighbours, the order of reading or the
ranks it is cut for.
"""

from __future__ import annotations

import hashlib

import torch

from kernels.cpu.packing import GroupQuantized, quantize_groups
from serving.models.weights import ALL


class RandomSource:
    """A `TensorSource` that has every tensor asked for, on `device` at once."""

    def __init__(self, seed: int, dtype: torch.dtype, device: torch.device) -> None:
        self._seed = seed
        self.dtype = dtype
        self._device = device

    def names(self) -> list[str]:
        """None that one could object to."""
        return []

    def tensor(
        self, name: str, shape: tuple[int, ...], rows: slice = ALL, columns: slice = ALL
    ) -> torch.Tensor:
        """As `TensorSource.tensor`, but on the source's device."""
        if len(shape) == 1:
            return torch.ones(shape, dtype=self.dtype, device=self._device)[rows]
        digest = hashlib.sha256(f"{self._seed} {name}".encode()).digest()
        generator = torch.Generator(self._device).manual_seed(int.from_bytes(digest[:7]))
        whole = torch.empty(shape, dtype=self.dtype, device=self._device)
        whole.normal_(std=shape[-1] ** -0.5, generator=generator)
        return whole if rows == columns == ALL else whole[rows, columns].clone()

    def is_quantized(self, name: str) -> bool:
        return False

    def groups(
        self, name: str, shape: tuple[int, int], rows: slice = ALL, columns: slice = ALL
    ) -> GroupQuantized:
        return quantize_groups(self.tensor(name, shape, rows, columns).cpu())
