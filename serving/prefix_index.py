"""Which replica has how much of a prompt cached: from the engines' block events. Pure.

    hash of a full block ──► the replicas that hold it, as the bits of an integer (by the fleet's rows)

A block's hash covers all before it, and an engine evicts what hangs on a prefix before the prefix: so
the replicas that hold block `i` of a prompt are among those that hold block `i - 1`, and how far each
one goes is found by bisection over the blocks at which the set changes.

Events carry numbers. Who missed some is told so, and wants a snapshot. What was routed and is not
computed yet is *expected*, for `EXPECTED_S`: by then the events speak for it. The last such prompt of
a replica stands at its blocks number 1, 2, 4, 8...; where a prompt finds few that share so many blocks,
how far each goes is found by bisection, else that number is taken.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from serving.messages import BlockEvents, BlockSnapshot, BlockStored

EXPECTED_S = 30.0
FEW = 8  # replicas; more share a common preamble, of which events tell exactly
Hashes = tuple[bytes, ...]
Depths = NDArray[np.int64]


@dataclass(slots=True)
class _Replica:
    """One replica's blocks."""

    row: int
    epoch: int
    last_number: int = 0
    is_whole: bool = True  # False from a gap to the next snapshot
    blocks: set[bytes] = field(default_factory=set)


class PrefixIndex:
    def __init__(self, max_blocks: int = 8_000_000) -> None:
        """At `max_blocks` (of all replicas together) no more are taken in: matches are found shorter."""
        self._max_blocks = max_blocks
        self._num_blocks = 0
        self._holders: dict[bytes, int] = {}
        self._replicas: dict[int, _Replica] = {}
        self._expected: dict[bytes, dict[int, Hashes]] = {}  # by hash and row
        self._order: deque[tuple[float, int, Hashes]] = deque()  # when each ends

    @property
    def num_blocks(self) -> int:
        return self._num_blocks

    def apply(self, row: int, epoch: int, news: BlockEvents | BlockSnapshot) -> bool:
        """Take news of a replica's cache. False when some before it is missing: send a snapshot.

        Between a gap and the snapshot what is known is kept: most of it is still true.
        """
        replica = self._replicas.get(row)
        if replica is not None and epoch < replica.epoch:
            return True  # of a process that is gone
        if replica is not None and epoch > replica.epoch:
            self.forget(row)
            replica = None
        if replica is None:
            replica = self._replicas[row] = _Replica(row, epoch)
        if isinstance(news, BlockSnapshot):
            if replica.is_whole and news.last_number < replica.last_number:
                return True  # the events since were faster
            self._clear(replica)
            for block_hash in news.block_hashes:
                self._add(replica, block_hash)
            replica.last_number, replica.is_whole = news.last_number, True
            return True
        if news.first_number > replica.last_number + 1:
            replica.is_whole = False
        skip = max(0, replica.last_number + 1 - news.first_number)  # told already, by a snapshot
        for event in news.events[skip:]:
            if isinstance(event, BlockStored):
                self._add(replica, event.block_hash)
            else:
                self._remove(replica, event.block_hash)
        replica.last_number = max(replica.last_number, news.first_number + len(news.events) - 1)
        return replica.is_whole

    def expect(self, row: int, hashes: Hashes, now: float) -> None:
        """This replica will have computed these blocks soon: they were routed there."""
        if not hashes:
            return
        for number in _powers(len(hashes)):
            self._expected.setdefault(hashes[number - 1], {})[row] = hashes
        self._order.append((now + EXPECTED_S, row, hashes))

    def withdraw(self, row: int, hashes: Hashes) -> None:
        """It will not after all: the replica turned them away."""
        for number in _powers(len(hashes)):
            sharing = self._expected.get(hashes[number - 1])
            if sharing is not None and sharing.get(row) == hashes:
                self._unexpect(hashes[number - 1], row)

    def match(self, hashes: Hashes, num_rows: int, now: float) -> Depths:
        """Cached or expected blocks of this prompt, by row: [num_rows]."""
        self._expire(now)
        depths = np.zeros(num_rows, dtype=np.int64)
        if not hashes:
            return depths
        holders = self._holders

        # A loop: a function that calls itself is a cycle, which keeps its arrays until one is searched for.
        spans = [(0, _bits(holders.get(hashes[0], 0)), len(hashes), 0)]
        while spans:  # `mask` holds block `low`, `high_mask` block `high`: who drops out between them?
            low, mask, high, high_mask = spans.pop()
            if mask == high_mask:
                continue
            if high - low == 1:
                depths[_rows(mask & ~high_mask, num_rows)] = high
                continue
            middle = (low + high) // 2
            middle_mask = _bits(holders.get(hashes[middle], 0)) & mask
            spans += ((low, mask, middle, middle_mask), (middle, middle_mask, high, high_mask))
        expected: dict[int, int] = {}
        for number in reversed(_powers(len(hashes))):
            sharing = self._expected.get(hashes[number - 1])
            if sharing is None:
                continue
            for row, other in sharing.items():
                if row not in expected:
                    expected[row] = _common(hashes, other, number) if len(sharing) <= FEW else number
        if expected:
            rows = list(expected)
            depths[rows] = np.maximum(depths[rows], list(expected.values()))
        return depths

    def forget(self, row: int) -> None:
        """The replica is gone, and its cache with it."""
        for block_hash in [name for name, sharing in self._expected.items() if row in sharing]:
            self._unexpect(block_hash, row)
        replica = self._replicas.pop(row, None)
        if replica is not None:
            self._clear(replica)

    def check_integrity(self) -> None:
        """Holders and the replicas' own sets tell the same story."""
        told: dict[bytes, int] = {}
        for replica in self._replicas.values():
            for block_hash in replica.blocks:
                told[block_hash] = told.get(block_hash, 0) | 1 << replica.row
        assert told == {block_hash: _bits(held) for block_hash, held in self._holders.items()}
        assert self._num_blocks == sum(len(replica.blocks) for replica in self._replicas.values())

    def _add(self, replica: _Replica, block_hash: bytes) -> None:
        if block_hash not in replica.blocks and self._num_blocks < self._max_blocks:
            replica.blocks.add(block_hash)
            held = self._holders.get(block_hash)
            self._holders[block_hash] = ~replica.row if held is None else _bits(held) | 1 << replica.row
            self._num_blocks += 1

    def _remove(self, replica: _Replica, block_hash: bytes) -> None:
        if block_hash in replica.blocks:
            replica.blocks.discard(block_hash)
            self._release(replica, block_hash)

    def _clear(self, replica: _Replica) -> None:
        for block_hash in replica.blocks:
            self._release(replica, block_hash)
        replica.blocks = set()

    def _release(self, replica: _Replica, block_hash: bytes) -> None:
        self._num_blocks -= 1
        left = _bits(self._holders[block_hash]) & ~(1 << replica.row)
        if not left:
            del self._holders[block_hash]
        elif left & (left - 1):
            self._holders[block_hash] = left
        else:
            self._holders[block_hash] = ~(left.bit_length() - 1)

    def _expire(self, now: float) -> None:
        while self._order and self._order[0][0] <= now:
            _, row, hashes = self._order.popleft()
            for number in _powers(len(hashes)):
                sharing = self._expected.get(hashes[number - 1])
                if sharing is not None and sharing.get(row) is hashes:  # no later one in its place
                    self._unexpect(hashes[number - 1], row)

    def _unexpect(self, block_hash: bytes, row: int) -> None:
        sharing = self._expected[block_hash]
        del sharing[row]
        if not sharing:
            del self._expected[block_hash]


def _rows(mask: int, num_rows: int) -> NDArray[np.bool_]:
    """The bits of `mask`, as [num_rows]."""
    octets = np.frombuffer(mask.to_bytes((num_rows + 7) // 8, "little"), dtype=np.uint8)
    return np.unpackbits(octets, count=num_rows, bitorder="little").view(np.bool_)


def _bits(holders: int) -> int:
    """A sole holder is kept as the complement of its row: as a bit it would take a byte for each 8 rows."""
    return holders if holders >= 0 else 1 << ~holders


def _powers(length: int) -> list[int]:
    """1, 2, 4... up to `length`."""
    return [1 << exponent for exponent in range(length.bit_length())]


def _common(one: Hashes, other: Hashes, least: int) -> int:
    """How many blocks two prompts begin with alike; the first `least` are."""
    low, high = least, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[middle - 1] == other[middle - 1]:
            low = middle
        else:
            high = middle - 1
    return low
