"""SkyWalker: the one peer with regions."""

from __future__ import annotations

from collections.abc import Sequence

from serving.bench.router.baseline_affinity import CHARS_PER_TOKEN, SentTree, TreeLimit, least_busy
from serving.bench.router.baseline_views import Asked, Candidate

TREE_LIMIT = TreeLimit((1 << 24) // CHARS_PER_TOKEN, 60.0)


class SkyWalker:
    """Selective pushing between regions (arXiv 2505.24095, EuroSys '26).

    skypilot-org/skypilot's branch `serve-multi-region-lb`, `sky/serve/load_balancer.py` and
    `load_balancing_policies.py`. A region's balancer pushes only to replicas whose engines have no
    pending request, its own first; are there none, to a peer region that has some; else the request
    waits, first come first served. Among the available, replicas as well as regions: the longest
    match, if it is over half of the text, else the fewest own requests in flight. One tree is of
    replicas, one of regions, 16 Mi characters each of them, cut every 60 s.

    The replica in a peer region is its own balancer's to choose; here this router's tree stands for
    the peer's. Stealing, which the branch has as an alternative to pushing, is left out.
    """

    name = "skywalker"
    reads_events = False
    tracks_active = False
    cache_threshold = 0.5

    def __init__(self, home: str) -> None:
        self._home = home
        self._replicas = SentTree(TREE_LIMIT)
        self._regions = SentTree(TREE_LIMIT)

    def joined(self, name: str) -> None:
        self._replicas.add(name)

    def left(self, name: str) -> None:
        self._replicas.remove(name)

    def choose(self, asked: Asked, candidates: Sequence[Candidate], now: float) -> Sequence[Candidate]:
        available = [candidate for candidate in candidates if candidate.num_waiting == 0]
        local = [candidate for candidate in available if candidate.region == self._home]
        if local or not available:
            return self._best(asked, local)
        region = self._region(asked, available)
        return self._best(asked, [candidate for candidate in available if candidate.region == region])

    def routed(self, asked: Asked, candidate: Candidate, now: float) -> None:
        self._replicas.sent(asked, candidate.name, now)
        if candidate.region != self._home:
            self._regions.sent(asked, candidate.region, now)

    def _best(self, asked: Asked, available: Sequence[Candidate]) -> Sequence[Candidate]:
        match = self._replicas.match(asked.units, {candidate.name for candidate in available})
        if asked.rate(match.length) > self.cache_threshold:
            available = [candidate for candidate in available if candidate.name in match.holders]
        return least_busy(available)[:1] if available else []

    def _region(self, asked: Asked, available: Sequence[Candidate]) -> str:
        busy: dict[str, int] = {}
        for candidate in available:
            busy[candidate.region] = busy.get(candidate.region, 0) + candidate.in_flight
        match = self._regions.match(asked.units, busy)
        choice = match.holders if asked.rate(match.length) > self.cache_threshold else tuple(busy)
        return min(choice, key=lambda region: (busy[region], region))
