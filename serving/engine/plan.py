"""A step's plan: what every rank needs for one forward pass, as one int32 array.

    T tokens of the step, B sequences, M widest block table, S rows whose logits are wanted

The tokens of one sequence are consecutive: rows `query_start[b]:query_start[b+1]` belong to b.
Its keys and values end at `context_lens[b]`, the step's own tokens included; token t writes to
slot `slot_mapping[t]` = block * block_tokens + offset.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int32]


@dataclass(frozen=True, slots=True, eq=False)
class BlockCopies:
    """Whole blocks that move between the KV pool and host memory before the step computes: spills first.

    No slot is the target of two spills, no block that of two fetches.
    """

    spills: Ints  # [n, 2] from a block, to a host slot
    fetches: Ints  # [m, 2] from a host slot, to a block

    def __bool__(self) -> bool:
        return len(self.spills) + len(self.fetches) > 0

    def pack(self) -> Ints:
        """One flat array `[n, m, ...]`."""
        counts = np.array([len(self.spills), len(self.fetches)], dtype=np.int32)
        return np.concatenate((counts, self.spills.reshape(-1), self.fetches.reshape(-1)))

    @classmethod
    def unpack(cls, flat: Ints) -> BlockCopies:
        """The copies in `flat`; the inverse of `pack`. Trailing padding is ignored."""
        spills, fetches = (2 * int(n) for n in flat[:2])
        pairs = flat[2 : 2 + spills + fetches].reshape(-1, 2)
        return cls(pairs[: spills // 2], pairs[spills // 2 :])


NO_COPIES = BlockCopies(np.empty((0, 2), dtype=np.int32), np.empty((0, 2), dtype=np.int32))


@dataclass(frozen=True, slots=True)
class StepPlan:
    token_ids: Ints  # [T]
    positions: Ints  # [T]
    slot_mapping: Ints  # [T]
    query_start: Ints  # [B + 1]
    context_lens: Ints  # [B]
    block_tables: Ints  # [B, M]; entries past a sequence's blocks are 0 and never read
    logits_rows: Ints  # [S] rows of the T tokens
    copies: BlockCopies = NO_COPIES

    def pack(self) -> Ints:
        """One flat array `[T, B, M, S, ...]`, fit for a single broadcast."""
        header = np.array(
            [len(self.token_ids), len(self.context_lens), self.block_tables.shape[1], len(self.logits_rows)],
            dtype=np.int32,
        )
        parts = (
            self.token_ids,
            self.positions,
            self.slot_mapping,
            self.query_start,
            self.context_lens,
            self.block_tables.reshape(-1),
            self.logits_rows,
            self.copies.pack(),
        )
        return np.concatenate((header, *parts))

    @classmethod
    def unpack(cls, flat: Ints) -> StepPlan:
        """The plan in `flat`; the inverse of `pack`. Trailing padding is ignored."""
        tokens, sequences, width, rows = (int(n) for n in flat[:4])
        sizes = (tokens, tokens, tokens, sequences + 1, sequences, sequences * width, rows)
        ends = np.cumsum((4, *sizes))
        parts = [flat[start:end] for start, end in itertools.pairwise(ends)]
        token_ids, positions, slot_mapping, query_start, context_lens, block_tables, logits_rows = parts
        return cls(
            token_ids=token_ids,
            positions=positions,
            slot_mapping=slot_mapping,
            query_start=query_start,
            context_lens=context_lens,
            block_tables=block_tables.reshape(sequences, width),
            logits_rows=logits_rows,
            copies=BlockCopies.unpack(flat[ends[-1] :]),
        )


@dataclass(frozen=True, slots=True)
class SamplingBatch:
    """Sampling controls of the S rows that want logits, as arrays. Only rank 0 needs it.

    A row's random number is a function of (seed, position) alone, so neither the batch it is in
    nor a preemption changes what is drawn.
    """

    temperature: NDArray[np.float32]  # [S]
    top_k: Ints  # [S]; 0 is off
    top_p: NDArray[np.float32]  # [S]
    min_p: NDArray[np.float32]  # [S]
    seed: NDArray[np.uint64]  # [S]
    position: Ints  # [S] position of the token to be drawn
