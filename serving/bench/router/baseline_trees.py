"""What the peers' routers remember of the prompts they have sent: approximate trees and LRU lists.

None of them asks the replicas: an entry says "was sent there", not "is cached there". Both structures
are over any sequence that can be cut and compared: the characters of a text, or a prompt's chained
block hashes, of which one stands for all the characters of its block.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Container, Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from typing import Any

Units = Sequence[Any]
"""A prompt: a str, or a tuple of block hashes."""

REFRESH_EVERY = 8  # a match renews its node for the LRU order once in so many


@dataclass(frozen=True, slots=True)
class Match:
    length: int  # units
    holders: tuple[str, ...]  # who was sent the deepest node that matched, the first one first


@dataclass(eq=False, slots=True)
class _Node:
    units: Units
    parent: _Node | None
    children: dict[Any, _Node] = field(default_factory=dict)  # by their first unit
    used: dict[str, int] = field(default_factory=dict)  # holder → when last; 0 where it only passed

    def is_leaf_of(self, holder: str) -> bool:
        return holder in self.used and not any(holder in child.used for child in self.children.values())


class PrefixTree:
    """One radix tree for all replicas; every node knows which of them were sent it.

    The rules are those of SGLang's router and its heirs: vllm-project/router `src/tree.rs` and
    smg-project/smg `crates/kv_index/src/string_tree.rs`; Ray Serve's `prefix_tree.py` differs in
    matching only what some candidate holds (`among`).
    """

    def __init__(self) -> None:
        self._root = _Node((), None)
        self._sizes: dict[str, int] = {}
        self._clock = 0

    def size(self, holder: str) -> int:
        """Units this replica was sent, a shared prefix counted once."""
        return self._sizes.get(holder, 0)

    def add(self, holder: str) -> None:
        self._root.used.setdefault(holder, 0)
        self._sizes.setdefault(holder, 0)

    def match(self, units: Units, among: Container[str] | None = None) -> Match:
        """The longest known prefix; with `among`, the longest that one of these was sent."""
        node, at = self._root, 0
        while at < len(units):
            child = node.children.get(units[at])
            if child is None or (among is not None and not any(name in among for name in child.used)):
                break
            shared = _shared(units, at, child.units)
            at += shared
            node = child
            if shared < len(child.units):
                break
        holders = tuple(name for name in node.used if among is None or name in among)
        if holders and self._tick() % REFRESH_EVERY == 0:
            node.used[holders[0]] = self._clock
        return Match(at, holders)

    def insert(self, units: Units, holder: str) -> None:
        self.add(holder)
        node, at = self._root, 0
        while at < len(units):
            child = node.children.get(units[at])
            if child is None:
                node.children[units[at]] = _Node(units[at:], node, used={holder: self._tick()})
                self._sizes[holder] += len(units) - at
                return
            shared = _shared(units, at, child.units)
            if shared < len(child.units):
                child = self._split(child, shared)
            if holder not in child.used:
                child.used[holder] = 0
                self._sizes[holder] += shared
            node, at = child, at + shared
        node.used[holder] = self._tick()

    def remove(self, holder: str) -> None:
        """Forget a replica that is gone."""
        self._root.used.pop(holder, None)
        for node in list(self._nodes()):
            node.used.pop(holder, None)
            if not node.used and not node.children:
                self._unlink(node)
        self._sizes.pop(holder, None)

    def evict(self, max_units: int, shared: bool = False) -> None:
        """Take leaves from whoever has more than `max_units`, the least recently used first.

        With `shared` the bound is for all replicas together. A node held by two counts twice.
        """
        total = sum(self._sizes.values())
        if (total if shared else max(self._sizes.values(), default=0)) <= max_units:
            return
        number = 0
        leaves = []
        for node in self._nodes():
            for holder, used in node.used.items():
                if node.is_leaf_of(holder):
                    leaves.append((used, number, holder, node))
                    number += 1
        heapify(leaves)
        while leaves:
            _, _, holder, node = heappop(leaves)
            if (total if shared else self._sizes[holder]) <= max_units or not node.is_leaf_of(holder):
                continue
            del node.used[holder]
            self._sizes[holder] -= len(node.units)
            total -= len(node.units)
            parent = node.parent
            if not node.used and not node.children:
                self._unlink(node)
            if parent is not None and parent.parent is not None and parent.is_leaf_of(holder):
                number += 1
                heappush(leaves, (parent.used[holder], number, holder, parent))

    def check_integrity(self) -> None:
        """Sizes are what the nodes say, and whoever holds a node holds what is before it."""
        sizes = dict.fromkeys(self._sizes, 0)
        for node in self._nodes():
            assert node.units and node.used and node.parent is not None
            assert node.parent.children[node.units[0]] is node
            for holder in node.used:
                sizes[holder] += len(node.units)
                assert holder in node.parent.used
        assert sizes == self._sizes

    def _split(self, node: _Node, length: int) -> _Node:
        parent = node.parent
        assert parent is not None
        upper = _Node(node.units[:length], parent, used=dict(node.used))
        parent.children[node.units[0]] = upper
        node.units, node.parent = node.units[length:], upper
        upper.children[node.units[0]] = node
        return upper

    def _unlink(self, node: _Node) -> None:
        if node.parent is not None:
            del node.parent.children[node.units[0]]

    def _nodes(self) -> list[_Node]:
        """All but the root, children before their parents."""
        nodes, stack = [], list(self._root.children.values())
        while stack:
            node = stack.pop()
            nodes.append(node)
            stack.extend(node.children.values())
        nodes.reverse()
        return nodes

    def _tick(self) -> int:
        self._clock += 1
        return self._clock


class LruBlocks:
    """The blocks each replica was last sent, as many as its cache holds (llm-d's approximate index).

    llm-d/llm-d-router `pkg/epp/framework/plugins/requestcontrol/dataproducer/approximateprefix/`:
    one LRU list a pod, and one map from a block to the pods that have it; looking up renews nothing.
    """

    def __init__(self) -> None:
        self._lists: dict[str, OrderedDict[bytes, None]] = {}
        self._holders: dict[bytes, set[str]] = {}

    def match(self, hashes: Sequence[bytes]) -> dict[str, int]:
        """How many of the first blocks each replica has; who has none is not in it."""
        depths: dict[str, int] = {}
        going: set[str] | None = None
        for depth, block_hash in enumerate(hashes):
            holders = self._holders.get(block_hash, set())
            still = set(holders) if going is None else going & holders
            for name in (going or set()) - still:
                depths[name] = depth
            going = still
            if not going:
                break
        depths.update(dict.fromkeys(going or (), len(hashes)))
        return depths

    def insert(self, hashes: Sequence[bytes], holder: str, capacity: int) -> None:
        blocks = self._lists.setdefault(holder, OrderedDict())
        for block_hash in hashes:
            if block_hash in blocks:
                blocks.move_to_end(block_hash)
                continue
            blocks[block_hash] = None
            self._holders.setdefault(block_hash, set()).add(holder)
            if len(blocks) > capacity:
                self._release(blocks.popitem(last=False)[0], holder)

    def remove(self, holder: str) -> None:
        for block_hash in self._lists.pop(holder, ()):
            self._release(block_hash, holder)

    def _release(self, block_hash: bytes, holder: str) -> None:
        holders = self._holders[block_hash]
        holders.discard(holder)
        if not holders:
            del self._holders[block_hash]


def _shared(units: Units, at: int, edge: Units) -> int:
    """How many units `units[at:]` and `edge` begin with alike; the first ones are equal."""
    high = min(len(units) - at, len(edge))
    if units[at : at + high] == edge[:high]:
        return high
    low = 1
    while high - low > 1:
        middle = (low + high) // 2
        if units[at : at + middle] == edge[:middle]:
            low = middle
        else:
            high = middle
    return low
