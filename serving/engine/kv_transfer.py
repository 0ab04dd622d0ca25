"""Host memory as the KV pool's second tier: whole blocks copied there and back, in the stream's order.

L layers, N blocks, K key/value heads of this rank, bt tokens a block, D head dim (in 32-bit words)

    spill   cache [L, 2, N, K, bt, D] ──gather──► staging [n, L, 2, K, bt, D] ══copy══► slot [L, 2, K, bt, D]
    fetch   cache                    ◄─scatter──  staging                    ◄══copy══  slot

A block's parts lie all over the cache, and in host memory in one piece: so a block is one large copy over
PCIe and not 2 L small ones. Everything is put into the device's one stream and nothing is waited for: a
step's copies come after the steps launched before it, and before its own forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Protocol

import torch

from serving.engine.cuda_device import Moment
from serving.engine.plan import BlockCopies, Ints

STAGING_BYTES = 64 << 20
"""Of the device's memory, at most, or one block."""

# Torch rounds pinned memory up to a power of two: whole pieces of one waste less than a block each.
_PIECE_BYTES = 1 << 30
_WORD_BYTES = 4


class Copier(Protocol):
    """The part of `cuda_device.Device` that is needed here. Work goes into one stream, in order."""

    def ints(self, count: int) -> torch.Tensor:
        """int32 [count] of the device."""
        ...

    def pinned(self, count: int) -> torch.Tensor:
        """int32 [count] of the host. Its memory is used anew only when copies from and to it are done."""
        ...

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Between the two."""
        ...

    def run(self, work: Callable[[], None]) -> None:
        """Launch what `work` launches."""
        ...

    def mark(self) -> Moment:
        """The point after all work up to now."""
        ...


class PlainCopier:
    """Where the model computes in host memory too: everything is done at once."""

    def ints(self, count: int) -> torch.Tensor:
        return torch.empty(count, dtype=torch.int32)

    def pinned(self, count: int) -> torch.Tensor:
        return torch.empty(count, dtype=torch.int32)

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
        target.copy_(source)

    def run(self, work: Callable[[], None]) -> None:
        work()

    def mark(self) -> Moment:
        return _Now()


class _Now:
    def synchronize(self) -> None:
        """Nothing is ever on its way."""


def staging_bytes(block_bytes: int, num_slots: int) -> int:
    """What a tier of so many slots takes of the device's memory."""
    return _staged_blocks(block_bytes, num_slots) * block_bytes


class HostKv:
    """`num_slots` slots of host memory, a block of `kv_cache` each. Their content is undefined at first."""

    def __init__(self, kv_cache: torch.Tensor, num_slots: int, copier: Copier) -> None:
        self._copier = copier
        self._num_slots = num_slots
        self.attach(kv_cache)
        shape = self._blocks.shape[1:]
        words = shape.numel()
        self._slots: list[torch.Tensor] = []  # each [L, 2, K, bt, D]
        in_piece = max(1, _PIECE_BYTES // (words * _WORD_BYTES))
        for first in range(0, num_slots, in_piece):
            count = min(in_piece, num_slots - first)
            self._slots += copier.pinned(count * words).view(count, *shape)

    def attach(self, kv_cache: torch.Tensor) -> None:
        """Copy from and to this cache from now on; the slots keep what they hold."""
        # Words, because not every operation knows every narrow dtype.
        self._blocks = kv_cache.view(torch.int32).movedim(2, 0)  # [N, L, 2, K, bt, D]
        shape = self._blocks.shape[1:]
        staged = _staged_blocks(shape.numel() * _WORD_BYTES, self._num_slots)
        self._staging = self._copier.ints(staged * shape.numel()).view(staged, *shape)

    def detach(self) -> None:
        """Let go of the cache, and of all else on the device."""
        del self._blocks, self._staging

    @torch.inference_mode()
    def run(self, copies: BlockCopies) -> None:
        """Put `copies` into the stream: all spills, then all fetches."""
        for blocks, slots in self._parts(copies.spills):
            staging = self._staging[: len(slots)]
            self._copier.run(partial(_gather, self._blocks, blocks, staging))
            for staged, slot in zip(staging, slots, strict=True):
                self._copier.copy(staged, self._slots[slot])
        for blocks, slots in self._parts(copies.fetches[:, ::-1]):
            staging = self._staging[: len(slots)]
            for staged, slot in zip(staging, slots, strict=True):
                self._copier.copy(self._slots[slot], staged)
            self._copier.run(partial(_scatter, self._blocks, blocks, staging))

    def _parts(self, pairs: Ints) -> Iterator[tuple[torch.Tensor, list[int]]]:
        """Of (block, slot) [n, 2]: as many at a time as can be staged, the blocks on the device."""
        if len(pairs) == 0:
            return
        there = self._copier.pinned(len(pairs))
        there.numpy()[:] = pairs[:, 0]
        blocks = self._copier.ints(len(pairs))
        self._copier.copy(there, blocks)
        slots: list[int] = pairs[:, 1].tolist()
        size = len(self._staging)
        for first in range(0, len(pairs), size):
            yield blocks[first : first + size], slots[first : first + size]


def _gather(cache: torch.Tensor, blocks: torch.Tensor, staging: torch.Tensor) -> None:
    torch.index_select(cache, 0, blocks, out=staging)


def _scatter(cache: torch.Tensor, blocks: torch.Tensor, staging: torch.Tensor) -> None:
    cache.index_copy_(0, blocks.long(), staging)


def _staged_blocks(block_bytes: int, num_slots: int) -> int:
    return max(1, min(num_slots, STAGING_BYTES // block_bytes))
