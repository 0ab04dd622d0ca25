"""How long answers will be: learned from those that ended, for each model and tenant. Pure.

Lengths are counted in buckets that grow by a quarter. Of the answers that reached bucket `b`, the part
`hazard[b]` ended in it; one that was cut off, by its limit or its client, counts as far as it got
(Kaplan and Meier 1958). A tenant's hazards are pulled towards its model's, as if it had seen `WEIGHT`
answers more of that kind, and a model's towards those of a shipped table:

    hazard[b]   = (ended[b] + WEIGHT · parent[b]) / (reached[b] + WEIGHT)
    survival[b] = Π (1 - hazard[i]), i < b
    E[min(length, limit)] = ∫ survival, from 0 to limit

Until a model has ended `COLD` answers, the table's 90th percentile is expected instead of a mean: to
reserve too much delays a few requests, to reserve too little has their work done twice.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]

WEIGHT = 8.0
COLD = 16  # ended answers
MEMORY = 512  # answers after which an earlier one counts 1 / e
MAX_TENANTS = 4096

# Deciles of output tokens in the Azure LLM inference trace of 2023, conversations (Patel et al. 2024).
TABLE = (54, 77, 91, 103, 129, 177, 384, 400, 424)
TAIL_TOKENS = 128.0  # beyond the last decile the survivors halve with so many more


def _edges() -> tuple[float, ...]:
    edges = [0.0, 8.0]
    while edges[-1] < 1 << 20:
        edges.append(edges[-1] * 1.25)
    return tuple(edges)


EDGES = _edges()
_WIDTHS = np.diff(EDGES)
_NUM = len(_WIDTHS)


def _table_hazards() -> Floats:
    """The table as hazards: a tenth ends, evenly spread, between one decile and the next."""

    def survival(tokens: float) -> float:
        knots = (0, *TABLE)
        index = bisect_right(knots, tokens) - 1
        if index == len(TABLE):
            return 0.1 * 0.5 ** ((tokens - TABLE[-1]) / TAIL_TOKENS)
        share = (tokens - knots[index]) / (knots[index + 1] - knots[index])
        return 1 - 0.1 * (index + share)

    alive = np.array([survival(edge) for edge in EDGES])
    return 1 - alive[1:] / np.maximum(alive[:-1], 1e-12)


@dataclass(slots=True)
class _Counts:
    """What is known of one model's, or one tenant's, answers."""

    ended: Floats = field(default_factory=lambda: np.zeros(_NUM))  # by bucket
    reached: Floats = field(default_factory=lambda: np.zeros(_NUM))
    num_ended: int = 0
    expected: Floats | None = None  # E[min(length, edge)], of the hazards when last asked

    def observe(self, tokens: int, is_whole: bool) -> None:
        keep = 1 - 1 / MEMORY
        last = bisect_right(EDGES, max(0, tokens - 1)) - 1
        self.ended *= keep
        self.reached *= keep
        self.reached[:last] += 1
        if is_whole:
            self.reached[last] += 1
            self.ended[last] += 1
            self.num_ended += 1
        self.expected = None

    def hazards(self, parent: Floats) -> Floats:
        return (self.ended + WEIGHT * parent) / (self.reached + WEIGHT)


class OutputLengths:
    """Expected output tokens, learned online. Memory is bounded: the tenant unheard of longest goes."""

    def __init__(self) -> None:
        self._models: dict[str, _Counts] = {}
        self._tenants: OrderedDict[tuple[str, str], _Counts] = OrderedDict()

    def observe(self, model: str, tenant_key: str, tokens: int, is_whole: bool) -> None:
        """An answer had so many tokens; not `is_whole` where it was cut off."""
        self._models.setdefault(model, _Counts()).observe(tokens, is_whole)
        counts = self._tenants.setdefault((model, tenant_key), _Counts())
        counts.observe(tokens, is_whole)
        self._tenants.move_to_end((model, tenant_key))
        if len(self._tenants) > MAX_TENANTS:
            self._tenants.popitem(last=False)

    def expected(self, model: str, tenant_key: str, max_tokens: int) -> int:
        """Tokens to reserve for an answer of at most `max_tokens`."""
        known = self._models.get(model)
        if known is None or known.num_ended < COLD:
            return min(max_tokens, TABLE[-1])
        counts = self._tenants.get((model, tenant_key), known)
        if counts.expected is None:
            hazards = known.hazards(_TABLE_HAZARDS)
            if counts is not known:
                hazards = counts.hazards(hazards)
            counts.expected = _expected(hazards)
        bucket = min(bisect_right(EDGES, max_tokens) - 1, _NUM - 1)
        low, high = float(counts.expected[bucket]), float(counts.expected[bucket + 1])
        share = min(1.0, (max_tokens - EDGES[bucket]) / float(_WIDTHS[bucket]))
        return max(1, min(max_tokens, round(low + share * (high - low))))


def _expected(hazards: Floats) -> Floats:
    """E[min(length, edge)] at every edge; within a bucket answers end evenly."""
    survival = np.concatenate(([1.0], np.cumprod(1 - hazards)))
    return np.concatenate(([0.0], np.cumsum(_WIDTHS * (survival[:-1] + survival[1:]) / 2)))


_TABLE_HAZARDS = _table_hazards()
