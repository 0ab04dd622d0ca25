"""A machine that is not always equally fast, as its own steps have shown it to be."""

from __future__ import annotations

from collections.abc import Sequence
from math import floor

import numpy as np


class Pace:
    """Replays how fast a real machine was, second by second, from the first again after the last.

    It is given steps that were run one after another: the seconds that each took, and the seconds that
    were foretold of it. Between them work and time grow evenly, so a step that is foretold `w` seconds and
    begins at `t` ends at `T(W(t) + w)`, where `W(t)` is the work done by `t` and `T` its inverse. A long
    step thus averages over what short ones show one by one.
    """

    def __init__(self, steps: Sequence[tuple[float, float]]) -> None:
        """Steps as (seconds taken, seconds foretold), all above 0."""
        both = np.array(steps, dtype=float)
        assert len(both) and (both > 0).all()
        self._time_s, self._work_s = np.vstack([np.zeros(2), np.cumsum(both, axis=0)]).T

    def end_of(self, start_s: float, work_s: float) -> float:
        """When a step ends that begins at `start_s` and is foretold `work_s` seconds."""
        period_s, period_work_s = float(self._time_s[-1]), float(self._work_s[-1])
        start_round = floor(start_s / period_s)
        begun_s = start_s - start_round * period_s
        work_s += float(np.interp(begun_s, self._time_s, self._work_s))
        rounds = floor(work_s / period_work_s)
        left_s = float(np.interp(work_s - rounds * period_work_s, self._work_s, self._time_s))
        return (start_round + rounds) * period_s + left_s
