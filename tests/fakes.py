"""Stand-ins that behave like the real thing where it matters, instead of being told what to say."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from serving.engine.executor import Done
from serving.engine.machine import Machine
from serving.engine.plan import BlockCopies, SamplingBatch, StepPlan

EMPTY = -1


def fake_next_token(token_ids: Sequence[int], seed: int, vocab_size: int) -> int:
    """The fake model: a pure function of every token so far and of the seed."""
    content = np.asarray(token_ids, dtype="<i4").tobytes() + seed.to_bytes(8, "little")
    return zlib.crc32(content) % vocab_size


class FakeExecutor:
    """An executor whose "KV cache" holds each slot's token and position.

    It draws from what it reads back through the block tables, so a wrong table, a slot overwritten
    too early or a prefix block with other content changes its outputs or fails an assertion. Host
    memory's slots hold the same of a block. A step has been
    run when its launch returns; whoever it runs ahead of need not ask for its tokens before the next launch.
    `is_poisoned` says for which contexts the logits are not finite.
    """

    bytes_per_weight = 4.0  # as in float32

    def __init__(
        self,
        num_blocks: int,
        block_tokens: int,
        vocab_size: int = 97,
        is_poisoned: Callable[[tuple[int, ...]], bool] = lambda token_ids: False,
        runs_ahead: bool = False,
        num_host_blocks: int = 0,
    ) -> None:
        self.runs_ahead = runs_ahead
        self.num_blocks = num_blocks
        self.num_host_blocks = num_host_blocks
        self.vocab_size = vocab_size
        self.num_steps = 0
        self.is_asleep = False
        self.computed_tokens = 0
        self._block_tokens = block_tokens
        self._is_poisoned = is_poisoned
        self._drawn = np.full(1, EMPTY, dtype=np.int32)  # by the launch before
        self._token_of = np.full(num_blocks * block_tokens, EMPTY, dtype=np.int32)
        self._position_of = np.full(num_blocks * block_tokens, EMPTY, dtype=np.int32)
        self._host = np.full((num_host_blocks, 2, block_tokens), EMPTY, dtype=np.int32)

    def measure_machine(self) -> Machine:
        return Machine()

    def launch(self, plan: StepPlan, sampling: SamplingBatch) -> Done:
        """Write all keys and values, then attend: the order of a real forward pass."""
        assert not self.is_asleep
        self._move(plan.copies)
        token_ids = self._known(plan.token_ids)
        assert len(np.unique(plan.slot_mapping)) == len(plan.slot_mapping), "two tokens in one slot"
        self._token_of[plan.slot_mapping] = token_ids
        self._position_of[plan.slot_mapping] = plan.positions
        self.num_steps += 1
        self.computed_tokens += len(plan.token_ids)
        drawn = [
            self._draw(plan, int(row), int(sampling.seed[index]), int(sampling.position[index]))
            for index, row in enumerate(plan.logits_rows)
        ]
        self._drawn = np.array(drawn, dtype=np.int32)
        return Done(self._drawn)

    def sleep(self, copies: BlockCopies) -> None:
        """All content is lost, but for host memory's."""
        assert not self.is_asleep
        self._move(copies)
        self.is_asleep = True
        self._token_of[:] = self._position_of[:] = EMPTY

    def wake(self) -> None:
        assert self.is_asleep
        self.is_asleep = False

    def close(self) -> None:
        """Nothing to end."""

    def _known(self, token_ids: NDArray[np.int32]) -> NDArray[np.int32]:
        unknown = token_ids < 0
        assert self.runs_ahead or not unknown.any(), "a placeholder"
        known = token_ids.copy()
        known[unknown] = self._drawn[-1 - token_ids[unknown]]
        return known

    def _move(self, copies: BlockCopies) -> None:
        """All spills read before any writes, as one batch of copies may; then likewise the fetches."""
        for pairs in (copies.spills, copies.fetches):
            assert len(np.unique(pairs[:, 1])) == len(pairs), "two contents for one place"
        blocks = np.stack((self._token_of, self._position_of)).reshape(2, self.num_blocks, -1).swapaxes(0, 1)
        self._host[copies.spills[:, 1]] = blocks[copies.spills[:, 0]]
        blocks[copies.fetches[:, 1]] = self._host[copies.fetches[:, 0]]
        self._token_of, self._position_of = blocks.swapaxes(0, 1).reshape(2, -1)

    def _draw(self, plan: StepPlan, row: int, seed: int, position: int) -> int:
        sequence = int(np.searchsorted(plan.query_start, row, side="right")) - 1
        context_len = int(plan.context_lens[sequence])
        assert row == plan.query_start[sequence + 1] - 1, "logits are wanted of a chunk's last row only"
        assert plan.positions[row] + 1 == context_len == position
        at = np.arange(context_len)
        slots = plan.block_tables[sequence, at // self._block_tokens] * self._block_tokens
        slots = slots + at % self._block_tokens
        assert (self._position_of[slots] == at).all(), "keys and values of other positions"
        token_ids = tuple(self._token_of[slots].tolist())
        if self._is_poisoned(token_ids):
            return -1
        return fake_next_token(token_ids, seed, self.vocab_size)
