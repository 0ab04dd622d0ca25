"""Simulated time: what is to happen when, in order."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush


class Agenda:
    """Acts of equal time happen in the order in which they were noted."""

    def __init__(self) -> None:
        self.now = 0.0
        self.num_acts = 0  # noted so far
        self.is_closing = False  # all requests have ended: whatever comes round again stops
        self._acts: list[tuple[float, int, Callable[..., None], tuple[object, ...]]] = []

    def at(self, time_s: float, act: Callable[..., None], *args: object) -> None:
        """Note that `act(*args)` happens at `time_s`, or now if that is past."""
        self.num_acts += 1
        heappush(self._acts, (max(time_s, self.now), self.num_acts, act, args))

    def run(self) -> None:
        """Let everything happen, until nothing is left to."""
        acts = self._acts
        while acts:
            self.now, _, act, args = heappop(acts)
            act(*args)
