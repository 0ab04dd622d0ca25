"""What a device did while steps ran, by the profiler's own record of it.

    idle share = 1 - union of all kernels' and copies' intervals / (end of the last - start of the first)

Nothing the engine says of itself enters it. A profiler slows the host that feeds the device, so this is an
upper bound; what the union comes to a step, over a step's time without a profiler, is the other one.
On a CPU the intervals are those of torch's operators.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec
from torch.profiler import ProfilerActivity, profile

_WORK = {"cuda": {"kernel", "gpu_memcpy", "gpu_memset"}, "cpu": {"cpu_op"}}
_ACTIVITIES = {"cuda": ProfilerActivity.CUDA, "cpu": ProfilerActivity.CPU}
_KERNELS_TOLD = 12
_NAME_CHARACTERS = 90

Interval = tuple[float, float]
"""Start and end, in one unit."""


class Timeline(msgspec.Struct, frozen=True):
    """`steps` steps under the profiler; `kernels` are those that took most, as shares of all work."""

    steps: int
    window_ms: float
    busy_ms: float
    kernels: tuple[tuple[str, float], ...]

    @property
    def idle_share(self) -> float:
        return 1 - self.busy_ms / self.window_ms

    @property
    def busy_ms_per_step(self) -> float:
        return self.busy_ms / self.steps


class Trace:
    """A profiler between `start` and `stop`, both on the thread whose work it is."""

    def __init__(self, device: str) -> None:
        self._work = _WORK[device]
        self._profile = profile(activities=[_ACTIVITIES[device]])

    def start(self) -> None:
        self._profile.start()

    def stop(self, steps: int) -> Timeline | None:
        """What was recorded of `steps` steps; None where that was nothing."""
        self._profile.stop()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            self._profile.export_chrome_trace(str(path))
            events = json.loads(path.read_bytes())["traceEvents"]
        return timeline_of([event for event in events if event.get("cat") in self._work], steps)


def timeline_of(events: list[dict[str, Any]], steps: int) -> Timeline | None:
    """Of a Chrome trace's complete events, whose times are in microseconds."""
    if not events or not steps:
        return None
    intervals = [(float(event["ts"]), float(event["ts"]) + float(event["dur"])) for event in events]
    window_us = max(end for _, end in intervals) - min(start for start, _ in intervals)
    by_name: Counter[str] = Counter()
    for event in events:
        by_name[event["name"][:_NAME_CHARACTERS]] += event["dur"]
    total_us = by_name.total() or 1.0
    kernels = tuple((name, us / total_us) for name, us in by_name.most_common(_KERNELS_TOLD))
    return Timeline(steps, window_us / 1e3, union(intervals) / 1e3, kernels)


def union(intervals: Iterable[Interval]) -> float:
    """The length that is covered by at least one interval."""
    covered, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        if end > reached:
            covered += end - max(start, reached)
            reached = end
    return covered
