"""The KV pool's bookkeeping: which block holds what, and who reads it.

    free ──allocate──► held ──release──► free        a block that was never full: no hash
                        │ ▲
               release  ▼ │ acquire (prefix hit)
                     evictable ──allocate──► held    hashed, no reader: still a prefix hit

A released full block keeps its hash until it is allocated again, least recently released first:
eviction is the free list. Every operation is O(1) a block. Changes to the set of names are logged.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from serving.engine.block_events import BlockEventLog
from serving.messages import BlockRemoved, BlockSnapshot, BlockStored


class BlockPool:
    """`num_blocks` blocks of `block_tokens` tokens each, numbered from 0."""

    def __init__(self, num_blocks: int, block_tokens: int) -> None:
        assert num_blocks > 0 and block_tokens > 0
        self.num_blocks = num_blocks
        self.block_tokens = block_tokens
        self.events = BlockEventLog()
        self._num_readers = [0] * num_blocks
        self._hash_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}
        self._free = list(range(num_blocks - 1, -1, -1))
        self._evictable: OrderedDict[int, None] = OrderedDict()  # least recently released first

    @property
    def num_free(self) -> int:
        """Blocks with neither reader nor hash."""
        return len(self._free)

    @property
    def num_evictable(self) -> int:
        """Blocks that are cached and have no reader."""
        return len(self._evictable)

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` can hand out."""
        return len(self._free) + len(self._evictable)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_tokens)

    def num_readers(self, block: int) -> int:
        return self._num_readers[block]

    def match(self, hashes: Iterable[bytes]) -> list[int]:
        """The cached blocks of the longest prefix of `hashes`. Takes no hold of them."""
        matched = []
        for block_hash in hashes:
            block = self._block_of.get(block_hash)
            if block is None:
                break
            matched.append(block)
        return matched

    def acquire(self, blocks: Iterable[int]) -> None:
        """Become one more reader of each of these matched blocks."""
        for block in blocks:
            if self._num_readers[block] == 0:
                del self._evictable[block]
            self._num_readers[block] += 1

    def allocate(self, count: int) -> list[int]:
        """`count` blocks of undefined content with one reader; never-hashed blocks go first."""
        assert 0 <= count <= self.num_available, "the caller makes room first"
        blocks = []
        for _ in range(count):
            block = self._free.pop() if self._free else self._evict()
            self._num_readers[block] = 1
            blocks.append(block)
        return blocks

    def register(self, block: int, block_hash: bytes, parent: bytes) -> None:
        """Name a held block's full content, so that others find it. `parent` is the name before it.

        Where another block already bears this name, that one stays the cached one.
        """
        assert self._num_readers[block] > 0 and self._hash_of[block] is None
        if block_hash not in self._block_of:
            self._block_of[block_hash] = block
            self._hash_of[block] = block_hash
            self.events.record(BlockStored(block_hash, parent))

    def forget(self, blocks: Iterable[int]) -> None:
        """Take held blocks' names away: nobody shall reuse their content."""
        for block in blocks:
            assert self._num_readers[block] > 0
            self._drop_hash(block)

    def snapshot(self) -> BlockSnapshot:
        """Everything that is cached now, for a consumer of the events that has missed some."""
        return BlockSnapshot(last_number=self.events.last_number, block_hashes=tuple(self._block_of))

    def release(self, blocks: Sequence[int]) -> None:
        """Stop reading a sequence's blocks, given in its order.

        The last is released first, so that a prefix outlives what hangs on it.
        """
        for block in reversed(blocks):
            self._num_readers[block] -= 1
            assert self._num_readers[block] >= 0, "released more often than held"
            if self._num_readers[block] == 0:
                if self._hash_of[block] is None:
                    self._free.append(block)
                else:
                    self._evictable[block] = None

    def check_integrity(self) -> None:
        """Assert that every block is in exactly one state and that the hash maps are inverse."""
        free, evictable = set(self._free), set(self._evictable)
        held = {block for block, readers in enumerate(self._num_readers) if readers > 0}
        assert len(free) == len(self._free), "a block is free twice"
        assert not (free & evictable or free & held or evictable & held)
        assert len(free) + len(evictable) + len(held) == self.num_blocks, "a block is lost"
        hashed = {block for block, block_hash in enumerate(self._hash_of) if block_hash is not None}
        assert evictable <= hashed and not (free & hashed)
        assert hashed == set(self._block_of.values())
        assert all(self._hash_of[block] == block_hash for block_hash, block in self._block_of.items())

    def _evict(self) -> int:
        block, _ = self._evictable.popitem(last=False)
        self._drop_hash(block)
        return block

    def _drop_hash(self, block: int) -> None:
        block_hash = self._hash_of[block]
        if block_hash is not None:
            del self._block_of[block_hash]
            self._hash_of[block] = None
            self.events.record(BlockRemoved(block_hash))
