"""A GPU runner's device with a clock at its captures: what CUDA graphs cost, and how many there are."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from serving.engine.cuda_device import Graph


class CaptureClock:
    """Put in place of a `CudaRunner`'s device; all but `capture` is that device's own."""

    def __init__(self, runner: Any) -> None:
        self._device = runner._device
        self.captures_s: list[float] = []
        runner._device = self

    def capture(self, work: Callable[[], None]) -> Graph:
        started_s = time.perf_counter()
        graph: Graph = self._device.capture(work)
        self.captures_s.append(time.perf_counter() - started_s)
        return graph

    def __getattr__(self, name: str) -> Any:
        return getattr(self._device, name)
