"""Weights in the layouts that `products.h` multiplies with: bfloat16, or 8 and 4 bits in groups of 32.

    BF16   w as it is
    Q8     w = scale (q - 128)         q in 0..255     GGUF's Q8_0; any float weight, by `quantize_groups`
    Q4     w = scale q + minimum       q in 0..15      GGUF's Q4_1 and Q4_0

`scale` and `minimum` are float16, one for 32 consecutive inputs of an output.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from kernels.cpu.library import Matrix

GROUP = 32
PANEL = 16  # outputs side by side in a register
_UNIT = 32  # outputs are padded to whole units of work
_BF16, _Q8, _Q4 = range(3)
_ARENA_BYTES = 64 << 20


@dataclass(frozen=True, slots=True, eq=False)
class GroupQuantized:
    """A weight [n, k] of 8-bit values (`minima` is None) or 4-bit values, one a byte."""

    values: NDArray[np.uint8]  # [n, k]
    scales: NDArray[np.float16]  # [n, k / 32]
    minima: NDArray[np.float16] | None  # [n, k / 32]

    def columns(self, part: slice) -> GroupQuantized:
        """Some inputs; `part` must begin and end at whole groups."""
        start, stop, _ = part.indices(self.values.shape[1])
        assert start % GROUP == 0 and stop % GROUP == 0
        groups = slice(start // GROUP, stop // GROUP)
        minima = None if self.minima is None else self.minima[:, groups]
        return GroupQuantized(self.values[:, start:stop], self.scales[:, groups], minima)

    def rows(self, order: NDArray[np.intp]) -> GroupQuantized:
        minima = None if self.minima is None else self.minima[order]
        return GroupQuantized(self.values[order], self.scales[order], minima)

    def dequantize(self) -> torch.Tensor:
        """float32 [n, k]."""
        n, k = self.values.shape
        grouped = self.values.reshape(n, -1, GROUP).astype(np.float32)
        scales = self.scales.astype(np.float32)[..., None]
        if self.minima is None:
            return torch.from_numpy(((grouped - 128) * scales).reshape(n, k))
        return torch.from_numpy((grouped * scales + self.minima.astype(np.float32)[..., None]).reshape(n, k))


def quantize_groups(weight: torch.Tensor) -> GroupQuantized:
    """The nearest 8-bit weight to `weight` [n, k], scaled so that each group's largest is 127."""
    n, k = weight.shape
    grouped = weight.float().reshape(n, k // GROUP, GROUP)
    scales = (grouped.abs().amax(dim=-1) / 127).half()
    divisor = torch.where(scales > 0, scales.float(), 1.0)
    values = (grouped / divisor[..., None]).round_().clamp_(-127, 127).add_(128).to(torch.uint8)
    return GroupQuantized(values.reshape(n, k).numpy(), scales.numpy(), None)


def stack(parts: list[GroupQuantized]) -> GroupQuantized:
    """Outputs of several weights one after another; all in 8 bits where their formats differ."""
    if len({part.minima is None for part in parts}) > 1:
        parts = [part if part.minima is None else quantize_groups(part.dequantize()) for part in parts]
    minima = [part.minima for part in parts if part.minima is not None]
    return GroupQuantized(
        np.concatenate([part.values for part in parts]),
        np.concatenate([part.scales for part in parts]),
        np.concatenate(minima) if minima else None,
    )


class Arena:
    """Memory in huge pages, where the system gives them; freed with the last array in it."""

    def __init__(self) -> None:
        self._map = mmap.mmap(-1, 1)
        self._used = len(self._map)

    def take(self, shape: tuple[int, ...], dtype: type[np.generic]) -> NDArray[np.generic]:
        """An array of zeros, aligned to 64 bytes."""
        num_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        start = -(-self._used // 64) * 64
        if start + num_bytes > len(self._map):
            self._map = mmap.mmap(-1, max(_ARENA_BYTES, num_bytes))
            with contextlib.suppress(OSError):  # a kernel without huge pages gives small ones
                self._map.madvise(mmap.MADV_HUGEPAGE)
            start = 0
        self._used = start + num_bytes
        return np.frombuffer(self._map, dtype=dtype, count=int(np.prod(shape)), offset=start).reshape(shape)


@dataclass(frozen=True, slots=True, eq=False)
class PackedMatrix:
    """A weight in panels, and the struct that points at it."""

    struct: Matrix
    values: NDArray[np.generic]
    scales: NDArray[np.generic] | None

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + (0 if self.scales is None else self.scales.nbytes)


def pack(weight: torch.Tensor | GroupQuantized, arena: Arena, library: ctypes.CDLL) -> PackedMatrix:
    """`weight` [n, k], bfloat16 or quantised, with n padded by zeros to whole units."""
    if isinstance(weight, torch.Tensor):
        return _pack_bf16(weight, arena, library)
    return _pack_groups(weight, arena, library)


def _pack_bf16(weight: torch.Tensor, arena: Arena, library: ctypes.CDLL) -> PackedMatrix:
    assert weight.dtype == torch.bfloat16
    rows = _pad(weight.contiguous().view(torch.int16).numpy())
    n, k = rows.shape
    values = arena.take((n // PANEL, k // 2, PANEL, 2), np.int16)
    library.searoom_pack_bf16(rows.ctypes.data, n, k, values.ctypes.data)
    return PackedMatrix(Matrix(_BF16, n, k, values.ctypes.data, None), values, None)


def _pack_groups(weight: GroupQuantized, arena: Arena, library: ctypes.CDLL) -> PackedMatrix:
    rows = _pad(np.ascontiguousarray(weight.values))
    n, k = rows.shape
    is_q4 = weight.minima is not None
    values = arena.take((n // PANEL, k // GROUP, GROUP * PANEL // (2 if is_q4 else 1)), np.uint8)
    pack_values = library.searoom_pack_q4 if is_q4 else library.searoom_pack_q8
    pack_values(rows.ctypes.data, n, k, values.ctypes.data)
    per_group = [weight.scales] if weight.minima is None else [weight.scales, weight.minima]
    scales = arena.take((n // PANEL, k // GROUP, len(per_group), PANEL), np.float16)
    for index, part in enumerate(per_group):
        scales[:, :, index] = _pad(part).reshape(n // PANEL, PANEL, -1).swapaxes(1, 2)
    struct = Matrix(_Q4 if is_q4 else _Q8, n, k, values.ctypes.data, scales.ctypes.data)
    return PackedMatrix(struct, values, scales)


def _pad(rows: NDArray) -> NDArray:
    missing = -len(rows) % _UNIT
    return np.ascontiguousarray(np.pad(rows, ((0, missing), (0, 0))) if missing else rows)
