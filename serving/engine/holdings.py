"""Who holds which blocks of the pool, and what has been promised beyond that.

A reservation is an entry (sequence → blocks) counted in headroom; it turns into blocks as they join
the sequence's table, so what of it is outstanding is `max(0, reserved - held)`:

    headroom = free + evictable - Σ outstanding
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

from serving.engine.block_pool import BlockPool
from serving.engine.sequence import Sequence


class Holdings:
    """The only one that changes a sequence's block table."""

    def __init__(self, pool: BlockPool) -> None:
        self.pool = pool
        self.outstanding_blocks = 0

    @property
    def headroom_blocks(self) -> int:
        """What a new request can count on. Negative while growth has outrun the reservations."""
        return self.pool.num_available - self.outstanding_blocks

    def cost_blocks(self, sequence: Sequence) -> int:
        """What accepting `sequence` would take from headroom.

        That is its demand, at most the whole pool, less the matched blocks that others hold anyway.
        A matched evictable block costs as much as a free one: it gets pinned.
        """
        matched = self.pool.match(sequence.matchable_hashes())
        shared = sum(self.pool.num_readers(block) > 0 for block in matched)
        demand = min(sequence.reserve_blocks, self.pool.num_blocks)
        return max(demand, len(matched)) - shared

    def open(self, sequence: Sequence) -> None:
        """Begin the reservation of an accepted sequence, and pin the prefix it matches."""
        sequence.reserve_blocks = min(sequence.reserve_blocks, self.pool.num_blocks)
        self.outstanding_blocks += sequence.outstanding_blocks
        self.hold_prefix(sequence)

    def hold_prefix(self, sequence: Sequence) -> None:
        """Take what more of the prefix is in the pool; it counts as computed."""
        matched = self.pool.match(sequence.matchable_hashes())
        self.pool.acquire(matched)
        self._take_prefix(sequence, matched)

    def bring_prefix(self, sequence: Sequence) -> None:
        """Take what more of the prefix is cached, in host memory too; the coming step has it computed.

        That takes blocks, fewer than it has known tokens for: the caller makes room first.
        """
        blocks, num_fetched = self.pool.bring(sequence.matchable_hashes())
        sequence.fetched_tokens = num_fetched * self.pool.block_tokens
        self._take_prefix(sequence, blocks)

    def allocate(self, sequence: Sequence, count: int) -> None:
        self._extend(sequence, self.pool.allocate(count))

    def register_full(self, sequence: Sequence, num_computed: int) -> None:
        """Offer the blocks that `num_computed` tokens fill to whoever has the same prefix."""
        if num_computed < (sequence.num_registered + 1) * self.pool.block_tokens:
            return
        hashes = sequence.block_hashes
        for index in range(sequence.num_registered, num_computed // self.pool.block_tokens):
            parent = hashes[index - 1] if index else sequence.hash_root
            self.pool.register(sequence.block_table[index], hashes[index], parent)
            sequence.num_registered = index + 1

    def drop(self, sequence: Sequence) -> None:
        """Release all its blocks; its reservation is outstanding again, its computed work is gone."""
        self.pool.release(sequence.block_table)
        self.outstanding_blocks -= sequence.outstanding_blocks
        del sequence.block_table[:]
        self.outstanding_blocks += sequence.outstanding_blocks
        sequence.num_computed = sequence.num_registered = 0

    def close(self, sequence: Sequence) -> None:
        """Release its blocks and what was left of its reservation."""
        self.drop(sequence)
        self.outstanding_blocks -= sequence.outstanding_blocks

    def check_integrity(self, sequences: Collection[Sequence]) -> None:
        """Assert that pool and sums agree with the block tables of all live sequences."""
        self.pool.check_integrity()
        assert self.outstanding_blocks == sum(sequence.outstanding_blocks for sequence in sequences)
        readers: Counter[int] = Counter()
        for sequence in sequences:
            assert len(set(sequence.block_table)) == len(sequence.block_table)
            assert sequence.num_computed <= len(sequence.block_table) * self.pool.block_tokens
            readers.update(sequence.block_table)
        assert all(self.pool.num_readers(block) == readers[block] for block in range(self.pool.num_blocks))

    def _take_prefix(self, sequence: Sequence, blocks: list[int]) -> None:
        if blocks:
            self._extend(sequence, blocks)
            sequence.num_registered = len(sequence.block_table)
            sequence.num_computed = len(sequence.block_table) * self.pool.block_tokens

    def _extend(self, sequence: Sequence, blocks: list[int]) -> None:
        self.outstanding_blocks -= sequence.outstanding_blocks
        sequence.block_table.extend(blocks)
        self.outstanding_blocks += sequence.outstanding_blocks
