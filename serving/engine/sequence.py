"""One request inside the engine: its tokens, how far they are computed, and its blocks.

tokens    p p p p p p p p o o ?        prompt, then outputs; `?` a step in flight draws
          └ computed ────────┘ └ the last one is always still to compute
blocks    [ 7 ][ 2 ][ 9 ]              block_table; the first num_registered are named in the pool

WAITING ──admit──► RUNNING ──► FINISHED
   └──◄──preempt──────┘

What is scheduled counts as computed: steps run in the order in which they were scheduled, so whatever is
scheduled later finds it done.
"""

from __future__ import annotations

import enum
from array import array
from dataclasses import dataclass, field

import numpy as np

from serving.block_hash import hash_block
from serving.messages import SamplingParams, SequenceTimes, Submit

UINT64_MASK = 2**64 - 1
INT32_MAX = 2**31 - 1
SAMPLING_ROW = np.dtype(
    [("temperature", "f4"), ("top_k", "i4"), ("top_p", "f4"), ("min_p", "f4"), ("seed", "u8")]
)
"""A sequence's sampling controls, packed once: a step joins its sequences' rows."""


class SequenceState(enum.Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


def _ints() -> array[int]:
    return array("i")


def _sampling_row(params: SamplingParams) -> bytes:
    """Wider integers than a row holds mean the same here: no limit, and a seed modulo 2^64."""
    top_k, seed = min(params.top_k, INT32_MAX), params.seed & UINT64_MASK
    row = (params.temperature, top_k, params.top_p, params.min_p, seed)
    return np.array(row, dtype=SAMPLING_ROW).tobytes()


@dataclass(slots=True, eq=False)
class Sequence:
    """Mutable; only the scheduler changes it. Times are seconds of the caller's clock."""

    request_id: str
    prompt_tokens: int
    sampling: SamplingParams
    hash_root: bytes
    reserve_blocks: int
    priority: int
    block_tokens: int
    sampling_row: bytes  # `sampling` as a SAMPLING_ROW
    max_backlog_tokens: int | None = None  # it was sent here in the belief that no more prefill waits

    token_ids: array[int] = field(default_factory=_ints)  # int32, prompt and outputs
    num_pending: int = 0  # of the last outputs: placeholders of tokens that steps in flight draw
    block_hashes: list[bytes] = field(default_factory=list)  # of every full block of known tokens
    block_table: array[int] = field(default_factory=_ints)  # int32
    num_computed: int = 0  # tokens whose keys and values are in the block table, or scheduled to be
    num_registered: int = 0  # leading blocks that need no further naming in the pool
    most_tokens: int = 0  # the scheduler's limit: with so many it ends
    arrival: int = 0  # given by the scheduler when it accepts
    state: SequenceState = SequenceState.WAITING
    is_aborted: bool = False  # its step is in flight, and nobody wants its token

    num_preemptions: int = 0
    tokens_when_preempted: int = 0

    accepted_s: float = 0.0
    admitted_s: float | None = None  # the first time
    cached_tokens: int = 0  # prompt tokens found in the prefix cache when first admitted
    fetched_tokens: int = 0  # of what was found when last admitted, those that came from host memory

    @classmethod
    def from_submit(cls, submit: Submit, block_tokens: int) -> Sequence:
        """A waiting sequence with its prompt hashed. Raises OverflowError on ids beyond int32."""
        sequence = cls(
            request_id=submit.request_id,
            prompt_tokens=len(submit.token_ids),
            sampling=submit.sampling,
            hash_root=submit.hash_root,
            reserve_blocks=submit.reserve_blocks,
            max_backlog_tokens=submit.max_backlog_tokens,
            priority=submit.priority,
            block_tokens=block_tokens,
            sampling_row=_sampling_row(submit.sampling),
        )
        sequence.token_ids.extend(submit.token_ids)
        sequence._extend_hashes()
        return sequence

    @property
    def order(self) -> tuple[int, int]:
        """Who goes first: the smaller one."""
        return self.priority, self.arrival

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_outputs(self) -> int:
        """Known ones."""
        return self.num_known - self.prompt_tokens

    @property
    def num_known(self) -> int:
        """Tokens that are no placeholders."""
        return len(self.token_ids) - self.num_pending

    @property
    def is_ending(self) -> bool:
        """Once the steps in flight are complete there is nothing more to compute for it."""
        return self.is_aborted or len(self.token_ids) >= self.most_tokens

    @property
    def num_uncomputed(self) -> int:
        """Tokens still to compute, at least the last one."""
        return len(self.token_ids) - self.num_computed

    @property
    def is_decoding(self) -> bool:
        """Only its newest output is still to compute."""
        return len(self.token_ids) == self.num_computed + 1 > self.prompt_tokens

    @property
    def is_protected(self) -> bool:
        """Was preempted and has won no token since: to preempt it again would be to run in place."""
        return self.num_preemptions > 0 and self.num_tokens == self.tokens_when_preempted

    @property
    def outstanding_blocks(self) -> int:
        """Reserved blocks that are not yet in the block table."""
        return max(0, self.reserve_blocks - len(self.block_table))

    def matchable_hashes(self) -> list[bytes]:
        """Hashes of the full blocks past the block table that a prefix hit may fill.

        The block of the last token is left out: its logits are wanted, so it is computed.
        """
        return self.block_hashes[len(self.block_table) : (self.num_tokens - 1) // self.block_tokens]

    def expect(self, placeholder: int) -> None:
        """A token will follow: a step that draws it has been scheduled."""
        self.token_ids.append(placeholder)
        self.num_pending += 1

    def learn(self, token_id: int) -> None:
        """The first of the placeholders has become known."""
        self.token_ids[self.num_known] = token_id
        self.num_pending -= 1
        if self.num_known % self.block_tokens == 0:
            self._extend_hashes()

    def forget_pending(self) -> None:
        """Nobody wants any more what steps in flight draw."""
        del self.token_ids[self.num_known :]
        self.num_pending = 0

    def times(self, now_s: float) -> SequenceTimes:
        """Where the time until the first token, at `now_s`, went."""
        assert self.admitted_s is not None
        return SequenceTimes(
            queue_ms=(self.admitted_s - self.accepted_s) * 1e3,
            prefill_ms=(now_s - self.admitted_s) * 1e3,
            cached_tokens=self.cached_tokens,
        )

    def _extend_hashes(self) -> None:
        """Hash the blocks that have become full; the chain of `block_hash.hash_blocks`."""
        start = len(self.block_hashes) * self.block_tokens
        while start + self.block_tokens <= self.num_known:
            parent = self.block_hashes[-1] if self.block_hashes else self.hash_root
            end = start + self.block_tokens
            self.block_hashes.append(hash_block(parent, self.token_ids[start:end]))
            start = end
