"""The KV pool's bookkeeping: which block holds what, and who reads it.

    free ──allocate──► held ──release──► free        a block that was never full: no hash
                        │ ▲
               release  ▼ │ acquire (prefix hit)
                     evictable ──allocate──► held    hashed, no reader: still a prefix hit

A released full block keeps its hash until it is allocated again, least recently released first:
eviction is the free list. Every operation is O(1) a block. Changes to the set of names are logged.
With a second tier (`host_tier.py`) what is evicted goes there, and is cached until it leaves that too.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Iterable, Sequence

from serving.engine.block_events import BlockEventLog
from serving.engine.host_tier import HostTier
from serving.engine.plan import NO_COPIES, BlockCopies
from serving.messages import BlockRemoved, BlockSnapshot, BlockStored


class BlockPool:
    """`num_blocks` blocks of `block_tokens` tokens each, numbered from 0, and where given a second tier."""

    def __init__(self, num_blocks: int, block_tokens: int, host: HostTier | None = None) -> None:
        assert num_blocks > 0 and block_tokens > 0
        self.num_blocks = num_blocks
        self.block_tokens = block_tokens
        self._host = host
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
        """The pool's blocks of the longest prefix of `hashes` that is in it. Takes no hold of them."""
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

    def bring(self, hashes: Sequence[bytes]) -> tuple[list[int], int]:
        """Blocks of the longest prefix of `hashes` that both tiers hold together, with one reader more.

        What is in host memory alone gets a block, at most one a hash, which the coming step fills before
        it computes. Returns also how many of them it did.
        """
        host = self._host
        if host is None:
            blocks = self.match(hashes)
            self.acquire(blocks)
            return blocks, 0
        names = list(itertools.takewhile(self._is_cached, hashes))
        missing = [name for name in names if name not in self._block_of]
        self.acquire(self._block_of[name] for name in names if name in self._block_of)
        host.pin(missing)  # before anything is evicted to make room
        filled = dict(zip(missing, self.allocate(len(missing)), strict=True))
        for name, block in reversed(filled.items()):  # a prefix outlives what hangs on it
            host.fetch(name, block)
            self._block_of[name] = block
            self._hash_of[block] = name
        return [self._block_of[name] for name in names], len(missing)

    def take_copies(self) -> BlockCopies:
        """What the coming step does between the tiers before it computes; asked for once a step."""
        return NO_COPIES if self._host is None else self._host.take_copies()

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
            if self._host is None or block_hash not in self._host:
                self.events.record(BlockStored(block_hash, parent))
            self._block_of[block_hash] = block
            self._hash_of[block] = block_hash

    def forget(self, blocks: Iterable[int]) -> None:
        """Take held blocks' names away, in both tiers: nobody shall reuse their content."""
        for block in blocks:
            assert self._num_readers[block] > 0
            block_hash = self._drop_hash(block)
            if block_hash is not None:
                if self._host is not None:
                    self._host.discard(block_hash)
                self.events.record(BlockRemoved(block_hash))

    def snapshot(self) -> BlockSnapshot:
        """Everything that is cached now, for a consumer of the events that has missed some."""
        hashes = tuple(self._block_of)
        if self._host is not None:
            hashes += tuple(name for name in self._host if name not in self._block_of)
        return BlockSnapshot(last_number=self.events.last_number, block_hashes=hashes)

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

    def evict_all(self) -> BlockCopies:
        """Empty the pool, which nobody reads; what fits goes to host memory, by the copies returned."""
        assert self.num_available == self.num_blocks, "somebody reads a block"
        while self._evictable:
            self._free.append(self._evict())
        return self.take_copies()

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
        if self._host is not None:
            self._host.check_integrity()

    def _is_cached(self, block_hash: bytes) -> bool:
        """In either tier."""
        return block_hash in self._block_of or (self._host is not None and block_hash in self._host)

    def _evict(self) -> int:
        block, _ = self._evictable.popitem(last=False)
        block_hash = self._drop_hash(block)
        assert block_hash is not None, "what is evictable has a name"
        lost = block_hash if self._host is None else self._host.spill(block_hash, block)
        if lost is not None and lost not in self._block_of:
            self.events.record(BlockRemoved(lost))
        return block

    def _drop_hash(self, block: int) -> bytes | None:
        """The name that it had."""
        block_hash = self._hash_of[block]
        if block_hash is not None:
            del self._block_of[block_hash]
            self._hash_of[block] = None
        return block_hash
