"""A device that does on CPU tensors what a GPU would, as late as a GPU might, and writes down what it did."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from kernels.attention_worklist import BatchCapacity, GpuAttentionBatch
from kernels.paged_attention import DecodeGroup, PrefillChunk, TorchAttentionBatch, plan_attention
from serving.engine.cuda_device import Graph, Moment


@dataclass
class LazyDevice:
    """Work waits in a queue until somebody waits for it, so that what the host changes too early shows."""

    seen: Counter[str] = field(default_factory=Counter)
    _queue: list[Callable[[], None]] = field(default_factory=list)
    _num_done: int = 0
    _pinned: dict[int, torch.Tensor] = field(default_factory=dict)  # kept, or others would get their places
    _has_run: set[int] = field(default_factory=set)

    def ints(self, count: int) -> torch.Tensor:
        return torch.zeros(count, dtype=torch.int32)

    def pinned(self, count: int) -> torch.Tensor:
        memory = torch.full((count,), -(2**31), dtype=torch.int32)
        self._pinned[memory.untyped_storage().data_ptr()] = memory
        return memory

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
        is_there, is_back = (part.untyped_storage().data_ptr() in self._pinned for part in (source, target))
        assert is_there != is_back, "one side is pinned"
        self.seen["to device" if is_there else "to host"] += 1
        self._queue.append(lambda: _copy(source, target))

    def run(self, work: Callable[[], None]) -> None:
        self.seen["eager"] += 1
        self._has_run.add(id(work))
        self._queue.append(work)

    def capture(self, work: Callable[[], None]) -> Graph:
        assert id(work) in self._has_run, "kernels are compiled before they are captured"
        self.seen["capture"] += 1
        return _Captured(self, work)

    def mark(self) -> Moment:
        return _Mark(self, self._num_done + len(self._queue))

    def finish(self, until: int | None = None) -> None:
        """Do what was put into the stream, up to its `until`-th work."""
        while self._queue and (until is None or self._num_done < until):
            work = self._queue.pop(0)
            self._num_done += 1
            with torch.inference_mode():
                work()

    @contextmanager
    def counting(self) -> Iterator[Counter[str]]:
        """What is done within the block, filled in when it ends."""
        before, within = self.seen.copy(), Counter[str]()
        yield within
        within.update(self.seen - before)


def _copy(source: torch.Tensor, target: torch.Tensor) -> None:
    target.copy_(source)


@dataclass
class _Captured:
    device: LazyDevice
    work: Callable[[], None]

    def replay(self) -> None:
        self.device.seen["replay"] += 1
        self.device._queue.append(self.work)


@dataclass
class _Mark:
    device: LazyDevice
    at: int

    def synchronize(self) -> None:
        self.device.finish(self.at)


class LiveAttention(TorchAttentionBatch):
    """The torch path's batch, planned from a GPU's buffers whenever it is read, as the kernels read them."""

    __slots__ = ("_batch", "_cache")

    def __init__(self, cache: torch.Tensor, batch: GpuAttentionBatch) -> None:
        object.__setattr__(self, "_cache", cache)  # past the base's frozen fields, which are never set
        object.__setattr__(self, "_batch", batch)

    @property
    def slots(self) -> torch.Tensor:
        return self._now().slots

    @property
    def decodes(self) -> tuple[DecodeGroup, ...]:
        return self._now().decodes

    @property
    def prefills(self) -> tuple[PrefillChunk, ...]:
        return self._now().prefills

    def _now(self) -> TorchAttentionBatch:
        batch = self._batch
        parts = (batch.slots, batch.query_start, batch.context_lens, batch.block_tables)
        arrays = (part.numpy().copy() for part in parts)
        planned = plan_attention(*arrays, cache=self._cache, dtype=self._cache.dtype)
        assert isinstance(planned, TorchAttentionBatch)
        return planned


def live_attention(cache: torch.Tensor) -> Callable[[torch.Tensor, BatchCapacity], LiveAttention]:
    """For `CudaRunner.view_attention`, where the torch path attends; `cache` is one layer's."""
    return lambda array, capacity: LiveAttention(cache, GpuAttentionBatch.view(array, capacity))
