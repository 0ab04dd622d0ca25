"""What one cache of the whole fleet's blocks would hit: the reference for any placement of requests.

Requests are taken in order of arrival and are over at once; a block is hit when it and all before it
are cached. Replies' blocks count as cached where the workload names them. A real fleet also keeps
decodes in these blocks and makes duplicates, but it decides with every request where its blocks go:
`pooled_lru` is a reference, not a bound. `belady` is a bound for a cache of this size: it evicts what
is needed last (Belady 1966), may decline to keep a block (Mattson et al. 1970), and evicts only when
a request has passed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush

from serving.simulator import SimRequest

_NEVER = 1 << 62


@dataclass(frozen=True, slots=True)
class CacheHits:
    """Blocks hit of each request's prompt, and the full blocks of all prompts."""

    by_request: tuple[int, ...]
    prompt_blocks: int

    @property
    def share(self) -> float:
        return sum(self.by_request) / self.prompt_blocks if self.prompt_blocks else 0.0


def prompt_blocks(requests: Sequence[SimRequest]) -> int:
    """All prompts' full blocks: what hit shares are shares of."""
    return sum(len(request.block_hashes) for request in requests)


def matchable(request: SimRequest, block_tokens: int) -> int:
    """Leading blocks that may be taken from a cache: not the last token's, since it is computed."""
    return min(len(request.block_hashes), (request.prompt_tokens - 1) // block_tokens)


def pooled_lru(requests: Sequence[SimRequest], num_blocks: int, block_tokens: int) -> CacheHits:
    """Least recently used blocks go first, of equal ones the deepest, as the engine releases them."""
    cached: OrderedDict[bytes, None] = OrderedDict()
    hits = []
    for request in requests:
        found = 0
        for name in request.block_hashes[: matchable(request, block_tokens)]:
            if name not in cached:
                break
            found += 1
        hits.append(found)
        for name in (*reversed(request.output_hashes), *reversed(request.block_hashes)):
            cached[name] = None
            cached.move_to_end(name)
        while len(cached) > num_blocks:
            cached.popitem(last=False)
    return CacheHits(tuple(hits), prompt_blocks(requests))


def belady(requests: Sequence[SimRequest], num_blocks: int, block_tokens: int) -> CacheHits:
    """The most hits a cache of so many blocks can have on this sequence.

    A block is used no later than what hangs on it; on a tie the deeper one goes, so what is cached is
    always whole chains.
    """
    next_use = _next_uses(requests, block_tokens)
    cached: dict[bytes, int] = {}  # to its next use
    last_needed: list[tuple[int, int, bytes]] = []  # heap of (-next use, -depth, name), some outdated
    hits = []
    for request, uses in zip(requests, next_use, strict=True):
        found = 0
        for name in request.block_hashes[: matchable(request, block_tokens)]:
            if name not in cached:
                break
            found += 1
        hits.append(found)
        for depth, (name, use) in enumerate(zip(_written(request), uses, strict=True)):
            if use == _NEVER:
                cached.pop(name, None)
            else:
                cached[name] = use
                heappush(last_needed, (-use, -depth, name))
        while len(cached) > num_blocks:
            negative_use, _, name = heappop(last_needed)
            if cached.get(name) == -negative_use:
                del cached[name]
        if len(last_needed) > 4 * num_blocks + 1024:
            last_needed = [entry for entry in last_needed if cached.get(entry[2]) == -entry[0]]
            heapify(last_needed)
    return CacheHits(tuple(hits), prompt_blocks(requests))


def _written(request: SimRequest) -> tuple[bytes, ...]:
    return request.block_hashes + request.output_hashes


def _next_uses(requests: Sequence[SimRequest], block_tokens: int) -> list[list[int]]:
    """For each block a request leaves: the number of the next request that could hit it."""
    upcoming: dict[bytes, int] = {}
    uses = []
    for index in range(len(requests) - 1, -1, -1):
        request = requests[index]
        uses.append([upcoming.get(name, _NEVER) for name in _written(request)])
        for name in request.block_hashes[: matchable(request, block_tokens)]:
            upcoming[name] = index
    uses.reverse()
    return uses
