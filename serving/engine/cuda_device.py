"""What the CUDA runner asks of the GPU besides mathematics: copies, events, graphs.

All of it stands here, on the calling thread's current stream, so that a fake that does the same on CPU
tensors tests everything else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch


class Moment(Protocol):
    """A point in the stream's work."""

    def synchronize(self) -> None:
        """Wait until the work before it is done."""
        ...


class Graph(Protocol):
    """Work that was captured."""

    def replay(self) -> None:
        """Put it into the stream, as it was captured, on what its tensors hold then."""
        ...


class Device(Protocol):
    """Work goes into one stream, in order; only `Moment.synchronize` and `capture` wait for it."""

    def ints(self, count: int) -> torch.Tensor:
        """Zeros, int32 [count], on the device."""
        ...

    def pinned(self, count: int) -> torch.Tensor:
        """int32 [count] of the host, which the device reads and writes by itself."""
        ...

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Between the device and pinned memory, or on the device."""
        ...

    def run(self, work: Callable[[], None]) -> None:
        """Launch what `work` launches."""
        ...

    def capture(self, work: Callable[[], None]) -> Graph:
        """Record what `work` launches, and run none of it. It must have run before."""
        ...

    def mark(self) -> Moment:
        """The point after all work up to now."""
        ...


class CudaDevice:
    """The GPU. Its graphs share one memory pool, so they must be replayed one after the other."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def ints(self, count: int) -> torch.Tensor:
        return torch.zeros(count, dtype=torch.int32, device=self._device)

    def pinned(self, count: int) -> torch.Tensor:
        return torch.zeros(count, dtype=torch.int32, pin_memory=True)

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
        target.copy_(source, non_blocking=True)

    def run(self, work: Callable[[], None]) -> None:
        work()

    def capture(self, work: Callable[[], None]) -> Graph:
        graph = torch.cuda.CUDAGraph()
        # Other threads (a watchdog of NCCL's, whoever reads the GPU's state) may call CUDA meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            work()
        return graph

    def mark(self) -> Moment:
        moment = torch.cuda.Event()
        moment.record()
        return moment
