"""Peers that send a prompt where its prefix was sent before, unless that is too busy.

    loads far apart ──► the least busy
    a long match    ──► its holder
    else            ──► the smallest tree, or the least busy

They differ in each of the three, and in whose load they count. Sizes of trees are in characters in
most of them; in a simulation, where a unit is a block of tokens, a token is taken for 4 characters.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, sqrt

from serving.bench.router.baseline_scores import least
from serving.bench.router.baseline_trees import PrefixTree
from serving.bench.router.baseline_views import Asked, Candidate

CHARS_PER_TOKEN = 4


@dataclass(frozen=True, slots=True)
class TreeLimit:
    """How large a tree may grow, in tokens: a replica's part of it, or all of it where `shared`."""

    tokens: int
    interval_s: float  # between two cuts
    shared: bool = False


class SentTree(PrefixTree):
    """The tree of what was sent where, cut back to its limit now and then."""

    def __init__(self, limit: TreeLimit | None = None) -> None:
        super().__init__()
        self._limit = limit
        self._cut_at_s: float | None = None

    def sent(self, asked: Asked, holder: str, now: float) -> None:
        self.insert(asked.units, holder)
        if self._cut_at_s is None:
            self._cut_at_s = now
        if self._limit is not None and now - self._cut_at_s >= self._limit.interval_s:
            self._cut_at_s = now
            self.evict(self._limit.tokens // asked.grain, shared=self._limit.shared)


class _TreeRule:
    """A rule with one such tree."""

    reads_events = False
    tracks_active = False

    def __init__(self, limit: TreeLimit | None = None) -> None:
        self.tree = SentTree(limit)

    def joined(self, name: str) -> None:
        self.tree.add(name)

    def left(self, name: str) -> None:
        self.tree.remove(name)

    def routed(self, asked: Asked, candidate: Candidate, now: float) -> None:
        self.tree.sent(asked, candidate.name, now)


class RayPrefix(_TreeRule):
    """Ray Serve LLM's `PrefixCacheAffinityRouter`.

    Ray 2.60.0, `ray/llm/_internal/serve/routing_policies/prefix_aware/prefix_aware_router.py` and its
    `prefix_tree.py`; defaults of the documentation (serve/llm/prefix-aware-request-router): queue
    lengths more than 10 apart: power of two. Else, with a tenth of the prompt matched, the shortest
    queue of the holders; else the shortest queue of those with the smallest tree. Trees are not cut
    (`do_eviction` is off). In the code the 10 became infinity, which never balances at all: the
    documented default is the stronger one.
    """

    name = "ray prefix"
    imbalance = 10.0
    match_rate = 0.1

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._random = random.Random(seed)

    def choose(self, asked: Asked, candidates: Sequence[Candidate], now: float) -> Sequence[Candidate]:
        queues = [candidate.ongoing for candidate in candidates]
        if max(queues) - min(queues) > self.imbalance:
            chosen = self._random.sample(list(candidates), min(2, len(candidates)))
        else:
            match = self.tree.match(asked.units, {candidate.name for candidate in candidates})
            if asked.rate(match.length) >= self.match_rate:
                chosen = [candidate for candidate in candidates if candidate.name in match.holders]
            else:
                chosen = least(candidates, lambda candidate: self.tree.size(candidate.name))
        return least(chosen, lambda candidate: candidate.ongoing)


class SglangCacheAware(_TreeRule):
    """`cache_aware` of SGLang's own router, before smg: threshold 0.3, balance 64 and 1.5.

    sgl-project/sglang `sgl-router/src/policies/cache_aware.rs` and `src/tree.rs`, as sglang-router 0.3.2
    behaves. Loads are this router's own requests in flight. More than 64 apart *and* more than 1.5
    times apart: the least busy. Else, with over 0.3 of the text matched, the first that was sent the
    deepest node; else the least busy. Among equals its own list's order decides, which differs from
    start to start; here they are drawn. Leaves go every 120 s from whoever has over 64 Mi characters.
    """

    name = "sglang"
    cache_threshold = 0.3
    balance_abs = 64
    balance_rel = 1.5

    def __init__(self, limit: TreeLimit = TreeLimit((1 << 26) // CHARS_PER_TOKEN, 120.0)) -> None:
        super().__init__(limit)

    def choose(self, asked: Asked, candidates: Sequence[Candidate], now: float) -> Sequence[Candidate]:
        if self._is_imbalanced(candidates):
            return least_busy(candidates)
        match = self.tree.match(asked.units)
        if asked.rate(match.length) <= self.cache_threshold:
            return self._on_miss(candidates)
        holder = [candidate for candidate in candidates if candidate.name == match.holders[0]]
        return holder or candidates[:1]

    def _on_miss(self, candidates: Sequence[Candidate]) -> Sequence[Candidate]:
        return least_busy(candidates)

    def _is_imbalanced(self, candidates: Sequence[Candidate]) -> bool:
        loads = [candidate.in_flight for candidate in candidates]
        spread = max(loads) - min(loads)
        return spread > self.balance_abs and max(loads) > self.balance_rel * min(loads)


class SglangSmallestTree(SglangCacheAware):
    """The same as its documentation has it, and its first versions did: misses go to the smallest tree.

    docs.sglang.ai, "SGLang Router", and `sgl-router/README.md`: the worker with the most cache free.
    """

    name = "sglang smallest tree"

    def _on_miss(self, candidates: Sequence[Candidate]) -> Sequence[Candidate]:
        return least(candidates, lambda candidate: self.tree.size(candidate.name))


class VllmRouter(SglangCacheAware):
    """vllm-router's `cache_aware`, a fork of SGLang's: load decides within and without the match.

    As 0.1.17 behaves (see `check_baselines`), which is newer than the last published source found,
    vllm-project/router `src/policies/cache_aware.rs` (16917f4): that has the first holder of the
    deepest node where the wheel takes the least busy of its holders, and the first of equally busy
    workers where the wheel draws. It asks a worker for the prompt's tokens (`/tokenize`) and matches
    those; where no worker answers, every request goes to the least busy. 32 Mi tokens a worker, cut
    every 120 s.
    """

    name = "vllm-router"

    def __init__(self) -> None:
        super().__init__(TreeLimit(1 << 25, 120.0))

    def choose(self, asked: Asked, candidates: Sequence[Candidate], now: float) -> Sequence[Candidate]:
        if self._is_imbalanced(candidates):
            return least_busy(candidates)
        match = self.tree.match(asked.units)
        if asked.rate(match.length) <= self.cache_threshold:
            return least_busy(candidates)
        holders = [candidate for candidate in candidates if candidate.name in match.holders]
        return least_busy(holders or candidates)


class Smg(_TreeRule):
    """smg's `cache_aware`, which SGLang's became: the gate is asked of each candidate, not of the fleet.

    smg-project/smg `model_gateway/src/policies/cache_aware.rs` and `least_load.rs`, and the options of
    1.13.0. Over 0.3 of the prompt matched: the holders of the deepest node (8 at most) that are not
    hot; where all are, whoever is not. Hot is, of own requests in flight with mean `m`,

        load > 1.5 m  and  load > m + min(64, max(4, ceil(2 sqrt(m))))

    Else everyone. Of these the least expected wait, at random among equals:

        (queued tokens + tokens sent since the poll) / 2000 + 0.15 k / (1 - k)       k: KV usage

    with loads polled every 10 s, and requests in flight where nothing was polled. Replicas with 8
    waiting requests or 0.8 of their KV cache in use are left out while another is not. The tree is
    that of its gRPC way, in tokens: 64 Mi for all replicas together, cut every 60 s.
    """

    name = "smg"
    cache_threshold = 0.3
    balance_abs = 64
    balance_rel = 1.5
    max_holders = 8

    POLL_S = 10.0
    TOKENS_PER_S = 2000.0
    KV_WEIGHT_S = 0.15
    OVERLOAD_WAITING, OVERLOAD_KV = 8, 0.8

    def __init__(self) -> None:
        super().__init__(TreeLimit(1 << 26, 60.0, shared=True))
        self._polled_at_s = float("-inf")
        self._polled: dict[str, tuple[float, int, float]] = {}  # queued tokens, waiting, KV usage
        self._sent_tokens: dict[str, float] = {}  # since the poll

    def choose(self, asked: Asked, candidates: Sequence[Candidate], now: float) -> Sequence[Candidate]:
        self._poll(candidates, now)
        eligible = [candidate for candidate in candidates if not self._is_overloaded(candidate)] or candidates
        mean = sum(candidate.in_flight for candidate in eligible) / len(eligible)
        match = self.tree.match(asked.units)
        names = match.holders[: self.max_holders]
        holders = [candidate for candidate in eligible if candidate.name in names]
        if asked.rate(match.length) <= self.cache_threshold or not holders:
            return self._least_wait(eligible)
        cool = [candidate for candidate in eligible if not self._is_hot(candidate, mean)]
        safe = [candidate for candidate in cool if candidate in holders]
        return self._least_wait(safe or cool or eligible)

    def routed(self, asked: Asked, candidate: Candidate, now: float) -> None:
        super().routed(asked, candidate, now)
        if candidate.name in self._sent_tokens:
            self._sent_tokens[candidate.name] += asked.prompt_tokens

    def left(self, name: str) -> None:
        super().left(name)
        self._polled.pop(name, None)
        self._sent_tokens.pop(name, None)

    def _is_hot(self, candidate: Candidate, mean: float) -> bool:
        margin = min(self.balance_abs, max(4, ceil(2 * sqrt(mean))))
        return candidate.in_flight > self.balance_rel * mean and candidate.in_flight > mean + margin

    def _is_overloaded(self, candidate: Candidate) -> bool:
        _, waiting, kv_usage = self._polled.get(candidate.name, (0.0, 0, 0.0))
        return waiting >= self.OVERLOAD_WAITING or kv_usage >= self.OVERLOAD_KV

    def _least_wait(self, candidates: Sequence[Candidate]) -> Sequence[Candidate]:
        if not any(candidate.name in self._polled for candidate in candidates):
            return least_busy(candidates)
        return least(candidates, self._wait_s)

    def _wait_s(self, candidate: Candidate) -> float:
        polled = self._polled.get(candidate.name)
        if polled is None:
            return candidate.in_flight * 1024 / self.TOKENS_PER_S  # its guess of a prompt's length
        queued_tokens, _, kv_usage = polled
        k = min(kv_usage, 0.999)
        tokens = queued_tokens + self._sent_tokens[candidate.name]
        return tokens / self.TOKENS_PER_S + self.KV_WEIGHT_S * k / (1 - k)

    def _poll(self, candidates: Sequence[Candidate], now: float) -> None:
        if now - self._polled_at_s < self.POLL_S:
            return
        self._polled_at_s = now
        for candidate in candidates:
            if candidate.load is not None:
                load = candidate.load
                queued_tokens = float(load.prefill_backlog_tokens)
                self._polled[candidate.name] = (queued_tokens, load.num_waiting, candidate.kv_usage)
                self._sent_tokens[candidate.name] = 0.0


def least_busy(candidates: Sequence[Candidate]) -> list[Candidate]:
    return least(candidates, lambda candidate: candidate.in_flight)
