"""Whether the pool will hold what it lets in: the expected need of blocks ahead, learned online.

Output lengths are counted in blocks. Of the sequences that reached output block `b`, the part
`hazard[b]` ended in it. Those still running, or cut off, count as far as they got; else the short
ones, which end first, would pass for typical (Kaplan and Meier 1958):

    hazard[b] = (ended[b] + w / prior) / (reached[b] + w)        survival[a] = Π (1 - hazard[b]), b < a

A running sequence in output block `a` with `p` blocks of its own holds `(p + t) · s(t)` blocks in
the mean when `t` more output blocks have passed, with `s(t) = survival[a + t] / survival[a]`, and the
square of its deviation is `(p + t)² · s(t) · (1 - s(t))`. All go on at the same pace, so their sums
over the sequences foretell the pool's use; one more is let in while

    shared + Σ mean(t) + DEVIATIONS · √Σ variance(t)  ≤  blocks in the pool      for all t

where `shared` counts the blocks that outlive each single reader. What the running ones are foreseen to
need beyond what they hold is no room for a new request: the replica reports it as reserved.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence as Collection
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serving.engine.block_pool import BlockPool
from serving.engine.sequence import Sequence

Floats = NDArray[np.floating[Any]]

PRIOR_OUTPUT_TOKENS = 256
"""Mean output length before any was seen."""


class OutputGrowth:
    """Survival of outputs by length; what is old counts less."""

    DEVIATIONS = 2.0  # fewer preempt more, more leave room unused
    HORIZON_BLOCKS = 64  # farther ahead nearly all have ended, or nothing can be said
    MEMORY = 256  # sequences after whose end an earlier one counts 1 / e
    PRIOR_WEIGHT = 2.0  # sequences that the prior stands for, at every length

    def __init__(
        self, pool: BlockPool, max_context_tokens: int, prior_tokens: int = PRIOR_OUTPUT_TOKENS
    ) -> None:
        self._pool = pool
        size = pool.blocks_for(max_context_tokens) + 1
        self._prior_hazard = min(1.0, pool.block_tokens / prior_tokens)
        self._foreseen: tuple[object, int] = (None, 0)
        self._ended = np.zeros(size)
        self._reached = np.zeros(size)

    def observe(self, sequence: Sequence, is_whole: bool) -> None:
        """A sequence ended: by itself (`is_whole`), or cut off before anybody knew how long it would be."""
        keep = 1 - 1 / self.MEMORY
        self._ended *= keep
        self._reached *= keep
        last = self._output_block(sequence)
        self._reached[:last] += 1
        if is_whole:
            self._reached[last] += 1
            self._ended[last] += 1

    def has_room(self, running: Collection[Sequence], waiting: Collection[Sequence]) -> bool:
        """Whether the first of `waiting` is expected to run beside `running` without want of blocks.

        What the others in line hold does not count: it gives way.
        """
        pool, head = self._pool, waiting[0]
        sequences = [*running, head]
        missing = pool.blocks_for(head.num_tokens) - len(head.block_table)
        if missing + self.HORIZON_BLOCKS * len(sequences) <= pool.num_available:
            return True  # nothing that is foreseen could fill it
        own = np.array([self._num_own(s) for s in sequences])
        own[-1] += missing
        yielding = sum(self._num_own(s) for s in waiting[1:])
        shared = pool.num_blocks - pool.num_available - yielding + missing - int(own.sum())
        return bool(shared + self._peak(sequences, own, len(running)) <= pool.num_blocks)

    def growth_blocks(self, running: Collection[Sequence], moment: object) -> int:
        """Blocks that `running` are foreseen to need beyond those they hold.

        Worked out again only when `moment` is another one than the last time.
        """
        if self._foreseen[0] != moment:
            own = np.array([self._num_own(s) for s in running])
            peak = self._peak(running, own, len(running)) if len(own) else 0.0
            self._foreseen = (moment, max(0, math.ceil(peak - own.sum())))
        return self._foreseen[1]

    def _peak(self, sequences: Collection[Sequence], own: NDArray[np.int_], num_running: int) -> float:
        """The most blocks that they are foreseen to hold alone at one time; the first ones run by now."""
        ages = np.array([self._output_block(s) for s in sequences])
        growth = np.array([self._pool.blocks_for(s.sampling.max_tokens) for s in sequences]) - ages
        ahead = np.arange(self.HORIZON_BLOCKS)[:, None]  # [T, 1]; the sequences are [B]
        survival = self._survival(ages[:num_running], int(ages.max()) + 1)
        alive = survival[ages + ahead] / survival[ages] * (ahead <= growth)
        mean = (own + ahead) * alive
        variance = (own + ahead) * mean * (1 - alive)
        return float((mean.sum(axis=1) + self.DEVIATIONS * np.sqrt(variance.sum(axis=1))).max())

    def _survival(self, running_ages: NDArray[np.int_], num_ages: int) -> Floats:
        """By output block: of the first `num_ages`, and the horizon of the last; zeros past any context."""
        size = min(len(self._ended), num_ages + self.HORIZON_BLOCKS)
        # The block they are in counts as survived: to err that way leaves some room, else work is lost.
        still = np.bincount(running_ages, minlength=size)[::-1].cumsum()[::-1]
        hazard = (self._ended[:size] + self.PRIOR_WEIGHT * self._prior_hazard) / (
            self._reached[:size] + still + self.PRIOR_WEIGHT
        )
        alive = np.concatenate(([1.0], 1 - hazard[:-1])).cumprod()
        missing = num_ages + self.HORIZON_BLOCKS - size
        return np.concatenate((np.maximum(alive, 1e-12), np.zeros(missing)))

    def _output_block(self, sequence: Sequence) -> int:
        """Which block of its output the sequence is in, counted from 0."""
        return max(0, sequence.num_outputs - 1) // self._pool.block_tokens

    def _num_own(self, sequence: Sequence) -> int:
        """Blocks that nobody else reads: all but the first ones, since a match is of a prefix."""
        readers, table = self._pool.num_readers, sequence.block_table
        return len(table) - bisect_left(table, True, key=lambda block: readers(block) == 1)
