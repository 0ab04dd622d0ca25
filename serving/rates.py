"""How much of something happens a second, lately. Pure: time is passed in."""

from __future__ import annotations

import math

LATELY_S = 30.0


class Rate:
    """An exponentially weighted rate: what happened `LATELY_S` ago counts 1 / e.

    Unbiased from the first second on: the sum is divided by the weight of the time it covers.
    """

    __slots__ = ("_began_s", "_sum", "_told_s")

    def __init__(self) -> None:
        self._sum = 0.0
        self._began_s: float | None = None
        self._told_s = 0.0

    def add(self, amount: float, now: float) -> None:
        if self._began_s is None:
            self._began_s = self._told_s = now
        self._sum = self._decayed(now) + amount
        self._told_s = max(now, self._told_s)

    def per_s(self, now: float) -> float:
        """0 before anything happened."""
        if self._began_s is None:
            return 0.0
        covered_s = LATELY_S * -math.expm1(-max(1.0, now - self._began_s) / LATELY_S)
        return self._decayed(now) / covered_s

    def _decayed(self, now: float) -> float:
        return self._sum * math.exp(-max(0.0, now - self._told_s) / LATELY_S)
