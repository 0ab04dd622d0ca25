"""Two ways for requests to enter a pool that is too small: as the Router holds them, and with foresight.

The oracle knows every output length. It lets a request in only when the blocks in use, step by step
until the last of those inside has ended, will never exceed the pool; so nothing is ever preempted.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import msgspec
import numpy as np

from serving.bench.engine.pressure_replay import KnownRequest, lengths_of
from serving.engine.block_pool import BlockPool
from serving.engine.growth import OutputGrowth
from serving.engine.scheduler import Scheduler
from serving.engine.sequence import Sequence as EngineSequence
from serving.engine.sequence import SequenceState
from serving.messages import Accepted, Refused

ORACLE_ORDERS: dict[str, Callable[[KnownRequest], int]] = {
    "first come, first served": lambda request: 0,
    "longest output first": lambda request: -request.output_tokens,
    "shortest output first": lambda request: request.output_tokens,
    "most block-steps first": lambda request: (
        -request.output_tokens * (2 * request.prompt_tokens + request.output_tokens)
    ),
}


class Trusting(OutputGrowth):
    """Foretells nothing: the line has looked ahead already."""

    def has_room(self, running: Sequence[EngineSequence], waiting: Sequence[EngineSequence]) -> bool:
        return True


class RouterLine:
    """First come, first served: the first in line is offered until the replica accepts it."""

    foresight: type[OutputGrowth] = OutputGrowth

    def __init__(self, requests: Sequence[KnownRequest]) -> None:
        self._line = deque(requests)

    def offer(self, scheduler: Scheduler, now_s: float) -> None:
        while self._line:
            sequence = EngineSequence.from_submit(self._line[0].submit, scheduler.pool.block_tokens)
            reply = scheduler.reserve(sequence, now_s)
            if isinstance(reply, Refused):
                assert not reply.permanent, reply.why
                return
            self._line.popleft()


class OpenDoor(RouterLine):
    """Everybody at once, into a pool that is known to hold all that will run together."""

    foresight = Trusting


class OracleLine:
    """Sorted by one of `ORACLE_ORDERS`; whoever fits goes in, past those who do not."""

    foresight = Trusting

    def __init__(self, requests: Sequence[KnownRequest], order: str) -> None:
        self._line = sorted(requests, key=ORACLE_ORDERS[order])
        self._lengths = lengths_of(requests)
        self._inside: list[EngineSequence] = []

    def offer(self, scheduler: Scheduler, now_s: float) -> None:
        """Who did not fit fits only after somebody has ended: until then all is as foreseen."""
        num_before = len(self._inside)
        self._inside = [s for s in self._inside if s.state is not SequenceState.FINISHED]
        if len(self._inside) == num_before and num_before:
            return
        self._line = [request for request in self._line if not self._admit(request, scheduler, now_s)]

    def _admit(self, request: KnownRequest, scheduler: Scheduler, now_s: float) -> bool:
        pool = scheduler.pool
        if len(self._inside) == scheduler.limits.max_num_seqs:
            return False
        if pool.blocks_for(request.prompt_tokens) > pool.num_available - self._promised_blocks(pool):
            return False  # not even now
        submit = msgspec.structs.replace(request.submit, reserve_blocks=0)
        sequence = EngineSequence.from_submit(submit, pool.block_tokens)
        candidates = [*self._inside, sequence]
        if self._peak_blocks(candidates, scheduler) > pool.num_blocks:
            return False
        assert isinstance(scheduler.reserve(sequence, now_s), Accepted)
        self._inside = candidates
        return True

    def _promised_blocks(self, pool: BlockPool) -> int:
        """Blocks of those let in that the scheduler has not allocated yet."""
        return sum(pool.blocks_for(s.num_tokens) - len(s.block_table) for s in self._inside)

    def _peak_blocks(self, sequences: Sequence[EngineSequence], scheduler: Scheduler) -> int:
        """The most blocks these will hold together at any step from now on.

        A sequence holds blocks for all tokens it knows, its newest output included, until it draws
        its last one: `first[i]` is the step in which it draws its next token, `left[i]` how many.
        """
        known = np.array([sequence.num_tokens for sequence in sequences])
        left = np.array([self._lengths[s.request_id] - s.num_tokens for s in sequences])
        first = self._first_draws(sequences, left, scheduler.limits.max_step_tokens)
        step = np.arange(int((first + left).max()))[:, None]
        tokens = known + np.maximum(0, step - first)
        blocks = -(-tokens // scheduler.pool.block_tokens) * (step < first + left)
        return int(blocks.sum(axis=1).max())

    @staticmethod
    def _first_draws(
        sequences: Sequence[EngineSequence], left: np.ndarray, max_step_tokens: int
    ) -> np.ndarray:
        """Prefills share what the decodes leave of each step's budget, in order."""
        first = np.zeros(len(sequences), dtype=int)
        pending = [(i, s.num_uncomputed) for i, s in enumerate(sequences) if not s.is_decoding]
        is_decoder = np.array([sequence.is_decoding for sequence in sequences])
        step = 0
        while pending:
            budget = max_step_tokens - int((is_decoder & (step < first + left)).sum())
            rest = []
            drew = []
            for index, uncomputed in pending:
                taken = min(budget, uncomputed)
                budget -= taken
                if taken == uncomputed:
                    first[index] = step
                    drew.append(index)
                else:
                    rest.append((index, uncomputed - taken))
            is_decoder[drew] = True
            pending = rest
            step += 1
        return first
