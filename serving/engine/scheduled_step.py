"""What the scheduler chose for one step, and its translation into arrays."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
import numpy as np

from serving.engine.plan import NO_COPIES, BlockCopies, SamplingBatch, StepPlan
from serving.engine.sequence import SAMPLING_ROW, Sequence


class Chunk(msgspec.Struct, frozen=True, eq=False):
    """Tokens `start : start + num_tokens` of a sequence, with blocks allocated for them."""

    sequence: Sequence
    start: int
    num_tokens: int
    is_decode: bool
    wants_token: bool  # it reaches the sequence's last token, so a next one is drawn

    @classmethod
    def next_of(cls, sequence: Sequence, budget: int) -> Chunk:
        """What of the sequence is to be computed next, at most `budget` tokens."""
        start, num_uncomputed = sequence.num_computed, sequence.num_uncomputed
        if num_uncomputed == 1:
            return cls(sequence, start, 1, start >= sequence.prompt_tokens, True)
        num_tokens = min(budget, num_uncomputed)
        return cls(sequence, start, num_tokens, False, num_tokens == num_uncomputed)

    @property
    def end(self) -> int:
        """The sequence's context length after the chunk."""
        return self.start + self.num_tokens


@dataclass(frozen=True, slots=True)
class ScheduledStep:
    """A step's chunks, one a sequence, with what was done to make room for them."""

    number: int
    chunks: tuple[Chunk, ...]
    num_preemptions: int
    prefix_hit_tokens: int  # of the prompts admitted in this step
    prefix_query_tokens: int
    host_hit_tokens: int = 0  # of the hits, those that come from host memory
    copies: BlockCopies = NO_COPIES

    def expect(self) -> None:
        """Tell the sequences that they are scheduled. A placeholder -1 - i is the i-th token the step draws:
        what a step launched right after it has in place of a token.
        """
        num_drawn = 0
        for chunk in self.chunks:
            chunk.sequence.num_computed = chunk.end
            if chunk.wants_token:
                num_drawn += 1
                chunk.sequence.expect(-num_drawn)

    @property
    def decode_tokens(self) -> int:
        return sum([chunk.is_decode for chunk in self.chunks])  # each of one token

    @property
    def prefill_tokens(self) -> int:
        return sum([chunk.num_tokens for chunk in self.chunks if not chunk.is_decode])


def build_plan(step: ScheduledStep, block_tokens: int) -> tuple[StepPlan, SamplingBatch]:
    """The arrays of `step`; their layout is told in `plan.py`. A pure function of it."""
    chunks = step.chunks
    counts = np.array([chunk.num_tokens for chunk in chunks], dtype=np.int32)
    starts = np.array([chunk.start for chunk in chunks], dtype=np.int32)
    context_lens = starts + counts
    query_start = np.zeros(len(chunks) + 1, dtype=np.int32)
    np.cumsum(counts, out=query_start[1:])

    # Joined as bytes and scattered at once: a numpy call a sequence would cost more than the step's rest.
    token_bytes = bytearray().join([chunk.sequence.token_ids[chunk.start : chunk.end] for chunk in chunks])
    token_ids = np.frombuffer(token_bytes, dtype=np.int32)
    tables = [chunk.sequence.block_table for chunk in chunks]
    widths = np.array([len(table) for table in tables])
    block_tables = np.zeros((len(chunks), widths.max()), dtype=np.int32)
    is_block = np.arange(widths.max()) < widths[:, None]
    block_tables[is_block] = np.frombuffer(b"".join(tables), dtype=np.int32)

    sequence_of = np.repeat(np.arange(len(chunks), dtype=np.int32), counts)
    positions = np.arange(len(token_ids), dtype=np.int32) + (starts - query_start[:-1])[sequence_of]
    slots = block_tables[sequence_of, positions // block_tokens] * block_tokens + positions % block_tokens
    wants_token = np.array([chunk.wants_token for chunk in chunks], dtype=bool)
    plan = StepPlan(
        token_ids=token_ids,
        positions=positions,
        slot_mapping=slots,
        query_start=query_start,
        context_lens=context_lens,
        block_tables=block_tables,
        logits_rows=query_start[1:][wants_token] - 1,
        copies=step.copies,
    )
    return plan, _sampling_batch([chunk for chunk in chunks if chunk.wants_token])


def _sampling_batch(chunks: list[Chunk]) -> SamplingBatch:
    rows = np.frombuffer(b"".join([chunk.sequence.sampling_row for chunk in chunks]), dtype=SAMPLING_ROW)
    columns = {name: np.ascontiguousarray(rows[name]) for name in SAMPLING_ROW.names or ()}
    return SamplingBatch(position=np.array([chunk.end for chunk in chunks], dtype=np.int32), **columns)
