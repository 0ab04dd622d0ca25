"""The engine's scheduler over sequences without tokens, and runs of its decode steps taken at once.

As long as every running sequence decodes, none ends, none waits that could be admitted and no block
is wanting, the scheduler's next steps are all alike: each sequence gets one token, now and then a
block, now and then a full block gets its name. A `DecodeRun` is `k` such steps. With B sequences of
n_i tokens before it, its j-th step has B tokens, Σ n_i + (j - 1)·B context tokens and as many more
query-key pairs, so a predicted time linear in j, and

    time of j steps = j·T(1) + B·(per_kv_token + per_pair)·j·(j - 1) / 2

Blocks are taken and named in the very order in which single steps would do it.
"""

from __future__ import annotations

import math
from array import array
from operator import itemgetter
from typing import cast

from cluster.load import StepCoefficients
from serving.engine.holdings import Holdings
from serving.engine.scheduler import Scheduler
from serving.engine.sequence import Sequence
from serving.messages import SamplingParams
from serving.simulator.contract import SimRequest

ORDINARY, STOP = 0, 1
"""The token ids of this world: every token is the same, but for the one that ends a reply."""

UNNAMED = 1 << 127
GROW, NAME = 0, 1  # a step begins with blocks for its tokens, and ends with names for full ones


class SimSequence(Sequence):
    """A sequence of which only the sizes are known; block hashes are given instead of computed.

    `bytearray` stands for the array of token ids: a byte a token, and appended to as fast.
    """

    __slots__ = ("end_tokens", "number", "output_hashes", "prompt_blocks")

    end_tokens: int
    number: int
    output_hashes: tuple[bytes, ...]
    prompt_blocks: int

    @classmethod
    def of(
        cls,
        request: SimRequest,
        request_id: str,
        reserve_blocks: int,
        max_backlog_tokens: int | None,
        block_tokens: int,
    ) -> SimSequence:
        sequence = cls(
            request_id=request_id,
            prompt_tokens=request.prompt_tokens,
            sampling=SamplingParams(max_tokens=request.max_tokens, stop_token_ids=(STOP,)),
            hash_root=b"",
            reserve_blocks=reserve_blocks,
            max_backlog_tokens=max_backlog_tokens,
            priority=request.priority,
            block_tokens=block_tokens,
            sampling_row=b"",
            token_ids=cast("array[int]", bytearray(request.prompt_tokens)),
            block_hashes=list(request.block_hashes),
        )
        sequence.end_tokens = request.prompt_tokens + request.output_tokens
        sequence.number = request.number
        sequence.output_hashes = request.output_hashes
        sequence.prompt_blocks = len(request.block_hashes)
        sequence._extend_hashes()
        return sequence

    @property
    def next_token(self) -> int:
        """What the model draws next."""
        return STOP if self.num_known + 1 >= self.end_tokens else ORDINARY

    def expect(self, placeholder: int) -> None:
        super().expect(ORDINARY)

    def grow(self, num_tokens: int) -> None:
        """Append so many ordinary tokens."""
        self.token_ids.extend(bytes(num_tokens))
        self._extend_hashes()

    def _extend_hashes(self) -> None:
        hashes, full = self.block_hashes, self.num_known // self.block_tokens
        while len(hashes) < full:
            index = len(hashes) - self.prompt_blocks
            if index < len(self.output_hashes):
                hashes.append(self.output_hashes[index])
            else:
                hashes.append((UNNAMED | self.number << 32 | len(hashes)).to_bytes(16, "big"))


class DecodeRun:
    """`num_steps` decode steps of the same sequences, from `start_s` on; nothing else happens in them."""

    def __init__(
        self,
        holdings: Holdings,
        sequences: list[Sequence],
        num_steps: int,
        start_s: float,
        step: StepCoefficients,
    ) -> None:
        self.num_steps = num_steps
        self.num_done = 0
        self.start_s = start_s
        self.batch_size = len(sequences)
        self._holdings = holdings
        self._sequences = cast("list[SimSequence]", sequences)
        kv_tokens = sum([len(sequence.token_ids) for sequence in sequences])
        batch = self.batch_size
        self._first_ms = step.predict_ms(batch, kv_tokens, batch, kv_tokens - batch / 2)
        self._growth_ms = batch * (step.per_kv_token_ms + step.per_pair_ms)
        self._changes = self._block_changes()
        self._num_changes_done = 0

    def time_of(self, num_steps: int) -> float:
        """When so many of its steps are done."""
        ms = num_steps * self._first_ms + self._growth_ms * num_steps * (num_steps - 1) / 2
        return self.start_s + ms / 1e3

    def steps_by(self, now_s: float) -> int:
        """How many of its steps are done at `now_s`."""
        quadratic, linear = self._growth_ms / 2, self._first_ms - self._growth_ms / 2
        passed_ms = (now_s - self.start_s) * 1e3
        root = math.sqrt(linear * linear + 4 * quadratic * passed_ms)
        steps = min(self.num_steps, int(2 * passed_ms / (linear + root)) if passed_ms > 0 else 0)
        while steps < self.num_steps and self.time_of(steps + 1) <= now_s:  # rounding
            steps += 1
        while steps > 0 and self.time_of(steps) > now_s:
            steps -= 1
        return steps

    def do(self, num_steps: int) -> None:
        """Bring sequences and pool to where they are after its first `num_steps` steps."""
        new_tokens = num_steps - self.num_done
        if new_tokens <= 0:
            return
        for sequence in self._sequences:
            sequence.grow(new_tokens)
        changes, holdings = self._changes, self._holdings
        while self._num_changes_done < len(changes):
            step, kind, _, sequence = changes[self._num_changes_done]
            if step > num_steps:
                break
            if kind == GROW:
                holdings.allocate(sequence, 1)
            else:
                sequence.num_computed = (sequence.num_registered + 1) * sequence.block_tokens
                holdings.register_full(sequence, sequence.num_computed)
            self._num_changes_done += 1
        for sequence in self._sequences:
            sequence.num_computed = len(sequence.token_ids) - 1
        self.num_done = num_steps

    def _block_changes(self) -> list[tuple[int, int, int, SimSequence]]:
        """(step, GROW or NAME, place in the batch, whose), in order."""
        changes: list[tuple[int, int, int, SimSequence]] = []
        for place, sequence in enumerate(self._sequences):
            block_tokens, end = sequence.block_tokens, self.num_steps + 1
            first_full = (sequence.num_registered + 1) * block_tokens - len(sequence.token_ids) + 1
            growths = range(_first_growth(sequence), end, block_tokens)
            changes += [(step, GROW, place, sequence) for step in growths]
            changes += [(step, NAME, place, sequence) for step in range(first_full, end, block_tokens)]
        changes.sort(key=itemgetter(0, 1, 2))
        return changes


class SimScheduler(Scheduler):
    """The engine's, which besides can say what its next steps will be."""

    def decode_run(self, start_s: float, step: StepCoefficients) -> DecodeRun | None:
        """The steps from here on that are all alike; None where there are not at least two."""
        if not self._running or self._in_flight or self._may_admit():
            return None
        num_steps = 1 << 30
        for sequence in self._running:
            tokens = len(sequence.token_ids)
            if tokens != sequence.num_computed + 1 or tokens <= sequence.prompt_tokens:
                return None  # it has not all of its prompt computed
            end_tokens = min(cast(SimSequence, sequence).end_tokens, sequence.most_tokens)
            num_steps = min(num_steps, end_tokens - tokens - 1)
        if num_steps >= 2:
            num_steps = self._steps_with_blocks(num_steps)
        if num_steps < 2 or len(self._running) > self.limits.max_step_tokens:
            return None
        return DecodeRun(self._holdings, list(self._running), num_steps, start_s, step)

    def go_on(self, run: DecodeRun, num_steps: int) -> None:
        """Bring everything to where it is after the first `num_steps` steps of a run begun here."""
        self._step_number += max(0, num_steps - run.num_done)
        run.do(num_steps)

    @property
    def waiting(self) -> tuple[Sequence, ...]:
        """Who waits to be admitted, in order; only to be read."""
        return tuple(self._waiting)

    @property
    def num_held_blocks(self) -> int:
        """Blocks that somebody reads."""
        return self.pool.num_blocks - self.pool.num_available

    def _may_admit(self) -> bool:
        """Whether the next step could let the first in line in."""
        if not self._waiting or len(self._running) >= self.limits.max_num_seqs:
            return False
        if len(self._running) >= self.limits.max_step_tokens:
            return False
        return self._held_back != (self._waiting[0], self._num_departures)

    def _steps_with_blocks(self, num_steps: int) -> int:
        """How many of so many steps find the blocks they need without taking any from others."""
        block_tokens, available = self.pool.block_tokens, self.pool.num_available
        firsts = [_first_growth(sequence) for sequence in self._running]
        needed = sum([(num_steps - first) // block_tokens + 1 for first in firsts if first <= num_steps])
        if needed <= available:
            return num_steps
        steps = sorted(step for first in firsts for step in range(first, num_steps + 1, block_tokens))
        return steps[available] - 1


def _first_growth(sequence: Sequence) -> int:
    """In which step from here on, counted from 1, a decoding sequence needs its next block."""
    return len(sequence.block_table) * sequence.block_tokens + 2 - len(sequence.token_ids)
