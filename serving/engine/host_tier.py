"""The second cache tier's bookkeeping: which slot of host memory holds which block. Pure.

    BlockPool ──evicts──► spill  (device block ► slot)  ─┐
    BlockPool ◄─brings──  fetch  (slot ► device block)  ─┴─ take_copies ─► the next step's plan

A step does its spills first, then its fetches, then computes, all in order. So a block that was spilled
may be fetched in the same step, and a slot that a fetch of the coming step reads takes no spill before.
A name stays when its block is fetched: what a name stands for never changes, and the next eviction of
that block then costs no copy. When all slots are full, the least recently used name gives way.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator

import numpy as np

from serving.engine.plan import BlockCopies, Ints


class HostTier:
    """`num_slots` slots of a block each, numbered from 0."""

    def __init__(self, num_slots: int) -> None:
        assert num_slots > 0
        self.num_slots = num_slots
        self._slot_of: OrderedDict[bytes, int] = OrderedDict()  # least recently used first
        self._free = list(range(num_slots - 1, -1, -1))
        self._pinned: set[bytes] = set()  # the coming step's fetches read them
        self._spills: dict[int, int] = {}  # slot → the block it is filled from
        self._fetches: dict[int, int] = {}  # block → the slot it is filled from

    def __contains__(self, block_hash: bytes) -> bool:
        return block_hash in self._slot_of

    def __iter__(self) -> Iterator[bytes]:
        """The names of what is here, or will be when the coming step computes."""
        return iter(self._slot_of)

    def __len__(self) -> int:
        return len(self._slot_of)

    def spill(self, block_hash: bytes, block: int) -> bytes | None:
        """Keep what `block` holds, before the coming step computes; `block` may be used again at once.

        Returns the name that is not here any more because of that: `block_hash` itself where every
        slot is pinned.
        """
        if block_hash in self._slot_of:
            self._slot_of.move_to_end(block_hash)
            return None
        lost: bytes | None = None
        if self._free:
            slot = self._free.pop()
        else:
            lost = next((name for name in self._slot_of if name not in self._pinned), None)
            if lost is None:
                return block_hash
            slot = self._slot_of.pop(lost)
        self._slot_of[block_hash] = slot
        self._spills[slot] = block
        return lost

    def pin(self, hashes: Iterable[bytes]) -> None:
        """Keep these names until the coming step's copies are taken: each of them will be fetched."""
        self._pinned.update(hashes)

    def fetch(self, block_hash: bytes, block: int) -> None:
        """Fill `block` with what has this pinned name, before the coming step computes."""
        assert block_hash in self._pinned
        self._fetches[block] = self._slot_of[block_hash]
        self._slot_of.move_to_end(block_hash)

    def discard(self, block_hash: bytes) -> None:
        """Nobody shall reuse what has this name. The copies of the coming step have been taken."""
        assert not self._fetches and not self._spills
        slot = self._slot_of.pop(block_hash, None)
        if slot is not None:
            self._free.append(slot)

    def take_copies(self) -> BlockCopies:
        """What the coming step copies before it computes. Whoever takes it must see that it is done."""
        copies = BlockCopies(spills=_pairs(self._spills), fetches=_pairs(self._fetches))
        self._spills.clear()
        self._fetches.clear()
        self._pinned.clear()
        return copies

    def check_integrity(self) -> None:
        """Assert that every slot is free or bears one name, and that pending copies concern such."""
        used, free = set(self._slot_of.values()), set(self._free)
        assert len(used) == len(self._slot_of), "two names for one slot"
        assert len(free) == len(self._free), "a slot is free twice"
        assert not used & free and len(used) + len(free) == self.num_slots
        assert self._pinned <= self._slot_of.keys(), "a name was lost that a fetch reads"
        assert self._spills.keys() <= used and set(self._fetches.values()) <= used


def _pairs(source_of: dict[int, int]) -> Ints:
    """[n, 2]: from where, to where."""
    pairs = [(source, target) for target, source in source_of.items()]
    return np.array(pairs, dtype=np.int32).reshape(-1, 2)
