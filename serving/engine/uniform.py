"""Random numbers that are a hash of (seed, position): the same in every batch, step and process."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def uniform(seed: NDArray[np.uint64], position: NDArray[np.int32]) -> NDArray[np.float64]:
    """A number in [0, 1) for each (seed, position).

    It is output number `position` of SplitMix64 (Steele, Lea & Flood 2014) started at a mix of the
    seed. 48 bits are used, so that the product with a sum of probabilities stays below that sum.
    """
    with np.errstate(over="ignore"):
        state = _mix(seed + _GOLDEN) + (position.astype(np.uint64) + np.uint64(1)) * _GOLDEN
    return (_mix(state) >> np.uint64(16)).astype(np.float64) * 2.0**-48


def _mix(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    with np.errstate(over="ignore"):
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))
