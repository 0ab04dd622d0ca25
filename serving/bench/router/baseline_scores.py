"""Peers that rank every replica by one figure: loads, weighted sums, costs and a product."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from serving.bench.router.baseline_trees import LruBlocks
from serving.bench.router.baseline_views import Asked, Candidate, Stateless


def least(candidates: Sequence[Candidate], figure: Callable[[Candidate], float]) -> list[Candidate]:
    """All candidates whose figure is the smallest."""
    figures = [figure(candidate) for candidate in candidates]
    smallest = min(figures)
    return [candidate for candidate, of in zip(candidates, figures, strict=True) if of == smallest]


class RoundRobin(Stateless):
    """Each in turn."""

    name = "round robin"

    def __init__(self) -> None:
        self._turn = 0

    def choose(self, asked: Asked, candidates: Sequence[Candidate], now: float) -> Sequence[Candidate]:
        return [candidates[self._turn % len(candidates)]]

    def routed(self, asked: Asked, candidate: Candidate, now: float) -> None:
        self._turn += 1


class PowerOfTwo(Stateless):
    """Of two drawn at random, the one with fewer ongoing requests: Ray Serve's default.

    Ray 2.60.0, `python/ray/serve/_private/request_router/pow_2_router.py`. Queue lengths are what a
    replica said last (each answer carries them) and what this router sent since.
    """

    name = "power of two"

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def choose(self, asked: Asked, candidates: Sequence[Candidate], now: float) -> Sequence[Candidate]:
        two = self._random.sample(list(candidates), min(2, len(candidates)))
        return least(two, lambda candidate: candidate.ongoing)


class LeastKv(Stateless):
    """The most of 1 - KV usage, as reported: AIBrix's `least-kv-cache`, llm-d's kv scorer alone.

    vllm-project/aibrix `pkg/plugins/gateway/algorithms/least_kv_cache.go`; llm-d/llm-d-router
    `pkg/epp/framework/plugins/scheduling/scorer/kvcacheutilization/kvcache_utilization.go`. Reports are
    all it reads, so between two of them all requests go to one replica.
    """

    name = "least KV"

    def choose(self, asked: Asked, candidates: Sequence[Candidate], now: float) -> Sequence[Candidate]:
        return least(candidates, lambda candidate: candidate.kv_usage)


class LlmD:
    """Prefix 3, queue 2, KV 2: the profile llm-d's router has when nobody configures one.

    llm-d/llm-d-router, the chart's `default-plugins.yaml` (`config/charts/routerlib/templates/
    _config.yaml`, 2b244b7); scorers under `pkg/epp/framework/plugins/scheduling/scorer/`:

        prefix = matched blocks / full blocks of the prompt, by the approximate index
        queue  = (longest - waiting) / (longest - shortest), 1 where all are equal
        kv     = 1 - KV usage

    The best sum wins, at random among equals (`max-score-picker`). The index keeps a LRU list a pod, as
    long as the pod's cache (`autoTune`), and matches at most 131,072 tokens.
    """

    name = "llm-d"
    reads_events = False
    tracks_active = False

    PREFIX, QUEUE, KV = 3.0, 2.0, 2.0
    MAX_PREFIX_TOKENS = 131_072
    DEFAULT_CAPACITY_BLOCKS = 31_250

    def __init__(self) -> None:
        self._index = LruBlocks()

    def joined(self, name: str) -> None:
        pass

    def left(self, name: str) -> None:
        self._index.remove(name)

    def choose(self, asked: Asked, candidates: Sequence[Candidate], now: float) -> Sequence[Candidate]:
        hashes = self._hashes(asked)
        depths = self._index.match(hashes)
        waiting = [candidate.num_waiting for candidate in candidates]
        longest, spread = max(waiting), max(waiting) - min(waiting)

        def cost(candidate: Candidate) -> float:
            prefix = depths.get(candidate.name, 0) / len(hashes) if hashes else 0.0
            queue = (longest - candidate.num_waiting) / spread if spread else 1.0
            score = self.PREFIX * prefix + self.QUEUE * queue + self.KV * (1 - candidate.kv_usage)
            return -score

        return least(candidates, cost)

    def routed(self, asked: Asked, candidate: Candidate, now: float) -> None:
        capacity = candidate.load.blocks_total if candidate.load else self.DEFAULT_CAPACITY_BLOCKS
        self._index.insert(self._hashes(asked), candidate.name, capacity)

    def _hashes(self, asked: Asked) -> Sequence[bytes]:
        return asked.units[: self.MAX_PREFIX_TOKENS // asked.grain]


class Dynamo(Stateless):
    """The fewest blocks: what is to be prefilled, less the overlap, and what is being decoded.

    ai-dynamo/dynamo 1.x, `lib/kv-router/src/scheduling/selector/default.rs` (07a6c9c), defaults
    (`overlap_score_credit` 1, `prefill_load_scale` 1, temperature 0, no active-request term):

        cost = max(0, (active prefill tokens + prompt) / block - overlap) + active blocks + new blocks

    Overlap is exact, from the engines' events. Active blocks are those of this router's own unfinished
    prompts, a shared one counted once (`router-replica-sync` is off by default); outputs are not
    counted (`track_output_blocks` is off). Ties are drawn. Dynamo strikes a prefill out at its first
    token; here the replica's report of its backlog, newer sends added, says what is left.
    """

    name = "dynamo"
    reads_events = True
    tracks_active = True

    def choose(self, asked: Asked, candidates: Sequence[Candidate], now: float) -> Sequence[Candidate]:
        def cost(candidate: Candidate) -> float:
            prefill = (candidate.backlog_tokens + asked.prompt_tokens) / asked.grain
            new_blocks = len(asked.units) - _active_depth(asked.units, candidate.active)
            return max(0.0, prefill - candidate.matched_blocks) + len(candidate.active) + new_blocks

        return least(candidates, cost)


class LMetric(Stateless):
    """The least product of prefill and batch: LMetric (arXiv 2603.15202, OSDI '26).

        score = (tokens still to prefill there + this prompt's uncached ones) * (requests there + 1)

    The first factor knows the caches, the second the load; whatever weights they had would cancel out
    in the comparison. llm-d/llm-d-router has it as `scorer/lmetric/lmetric.go` (1fee9c8), without the
    prefill that waits.
    """

    name = "lmetric"
    reads_events = True

    def choose(self, asked: Asked, candidates: Sequence[Candidate], now: float) -> Sequence[Candidate]:
        def score(candidate: Candidate) -> float:
            uncached = asked.prompt_tokens - candidate.matched_blocks * asked.grain
            return (candidate.backlog_tokens + uncached) * (candidate.ongoing + 1)

        return least(candidates, score)


def _active_depth(hashes: Sequence[bytes], active: dict[bytes, int]) -> int:
    """How many of the first blocks some unfinished prompt has: with a block goes all before it."""
    low, high = 0, len(hashes)
    while low < high:
        middle = (low + high + 1) // 2
        if hashes[middle - 1] in active:
            low = middle
        else:
            high = middle - 1
    return low
