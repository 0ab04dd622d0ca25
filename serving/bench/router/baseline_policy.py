"""A peer's rule behind the simulator's `Policy`: the one adapter of all baselines.

A Route reserves nothing: behind a peer's router a replica queues by itself, as vLLM and SGLang do, so
no replica with a pool large enough refuses. A rule that finds nobody (SkyWalker's does) lets the
request wait, first come first served.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from cluster.load import ReplicaLoad
from serving.bench.router.baseline_views import Asked, Candidate, Rule
from serving.messages import (
    BlockEvents,
    BlockSnapshot,
    DispatchUpdate,
    Overloaded,
    Queued,
    Route,
    RouteReply,
    RouteRequest,
)
from serving.prefix_index import PrefixIndex

Answers = list[tuple[str, RouteReply]]

RETRY_AFTER_S = 1.0


@dataclass(slots=True)
class _Dispatch:
    """A request that was routed and has not ended."""

    request: RouteRequest
    candidate: Candidate
    submission: int = 0  # the replica's number of it, 0 until it accepted


class BaselinePolicy:
    def __init__(self, rule: Rule, region_of: Mapping[str, str], *, block_tokens: int, seed: int) -> None:
        """`region_of` says where each replica stands; ties are broken by a generator of this seed."""
        self._rule = rule
        self._region_of = region_of
        self._block_tokens = block_tokens
        self._random = random.Random(seed)
        self._replicas: dict[str, Candidate] = {}
        self._dispatches: dict[str, _Dispatch] = {}
        self._waiting: deque[RouteRequest] = deque()
        self._index = PrefixIndex()
        self._num_rows = 0

    def request(self, request: RouteRequest, now: float) -> RouteReply:
        """Answer a new request, or one whose Route came to nothing and which asks again."""
        self._end(request.request_id)
        self._waiting = deque(w for w in self._waiting if w.request_id != request.request_id)
        answer = None if self._waiting else self._answer(request, now)  # those who wait come first
        if answer is not None:
            return answer
        self._waiting.append(request)
        return Queued(request_id=request.request_id, position=len(self._waiting), predicted_wait_ms=0.0)

    def update(self, update: DispatchUpdate, now: float) -> Answers:
        dispatch = self._dispatches.get(update.request_id)
        if update.outcome == "lost" and not update.request_id:
            self._forget(update.replica_id)
        elif dispatch is None or dispatch.candidate.name != update.replica_id:
            return []  # of an older Route
        elif update.outcome == "accepted":
            dispatch.submission = update.submission
            load = dispatch.candidate.load
            if load is not None and load.last_submission >= update.submission:
                dispatch.candidate.unreported.pop(update.request_id, None)
        else:
            self._end(update.request_id)
        return self._advance(now)

    def replica_reported(self, load: ReplicaLoad, now: float) -> Answers:
        replica = self._replicas.get(load.replica_id)
        known = replica.load if replica else None
        if replica is None or (known and (known.epoch, known.sequence) >= (load.epoch, load.sequence)):
            return []
        replica.load = load
        for request_id in list(replica.unreported):
            submission = self._dispatches[request_id].submission
            if 0 < submission <= load.last_submission:
                del replica.unreported[request_id]
        return self._advance(now)

    def replica_events(
        self, replica_id: str, epoch: int, news: BlockEvents | BlockSnapshot, now: float
    ) -> bool:
        replica = self._replicas.get(replica_id)
        if replica is None or not self._rule.reads_events:
            return True
        return self._index.apply(replica.row, epoch, news)

    def membership(self, ids: AbstractSet[str], now: float) -> Answers:
        for name in [name for name in self._replicas if name not in ids]:
            self._forget(name)
        for name in sorted(ids - self._replicas.keys()):
            self._replicas[name] = Candidate(name, self._region_of[name], row=self._num_rows)
            self._num_rows += 1
            self._rule.joined(name)
        return self._advance(now)

    def tick(self, now: float) -> Answers:
        return self._advance(now)

    def check_integrity(self) -> None:
        """What is counted on the replicas is what was dispatched."""
        assert sum(replica.in_flight for replica in self._replicas.values()) == len(self._dispatches)
        for replica in self._replicas.values():
            assert replica.unreported.keys() <= self._dispatches.keys()
            assert replica.in_flight or not replica.active

    def _answer(self, request: RouteRequest, now: float) -> Route | Overloaded | None:
        """None: the rule lets it wait."""
        if request.deadline_s <= now:
            return self._overloaded(request, "its deadline passed", permanent=False)
        refused = set(request.refused_replicas)
        candidates = [
            replica
            for replica in self._replicas.values()
            if replica.name not in refused and not (replica.load and replica.load.draining)
        ]
        if not candidates:
            why = "every replica refused" if refused else "there is no replica"
            return self._overloaded(request, why, permanent=bool(refused))
        asked = Asked(
            request_id=request.request_id,
            units=request.block_hashes,
            grain=self._block_tokens,
            size=request.prompt_tokens,
            prompt_tokens=request.prompt_tokens,
        )
        if self._rule.reads_events:
            depths = self._index.match(request.block_hashes, self._num_rows, now)
            for candidate in candidates:
                candidate.matched_blocks = int(depths[candidate.row])
        best = self._rule.choose(asked, candidates, now)
        if not best:
            return None
        chosen = best[0] if len(best) == 1 else self._random.choice(best)
        self._rule.routed(asked, chosen, now)
        self._begin(request, chosen)
        return Route(
            request_id=request.request_id,
            replica_id=chosen.name,
            region=chosen.region,
            reserve_blocks=0,
            matched_blocks=chosen.matched_blocks,
            predicted_ms=0.0,
            why=f"{self._rule.name}: one of {len(best)} equally good of {len(candidates)}",
        )

    def _advance(self, now: float) -> Answers:
        answers: Answers = []
        while self._waiting:
            answer = self._answer(self._waiting[0], now)
            if answer is None:
                break
            answers.append((self._waiting.popleft().ingress_id, answer))
        return answers

    def _begin(self, request: RouteRequest, replica: Candidate) -> None:
        uncached = request.prompt_tokens - replica.matched_blocks * self._block_tokens
        self._dispatches[request.request_id] = _Dispatch(request, replica)
        replica.in_flight += 1
        replica.unreported[request.request_id] = max(1, uncached)
        if self._rule.tracks_active:
            for block_hash in request.block_hashes:
                replica.active[block_hash] = replica.active.get(block_hash, 0) + 1

    def _end(self, request_id: str) -> None:
        dispatch = self._dispatches.pop(request_id, None)
        if dispatch is None:
            return
        replica = dispatch.candidate
        replica.in_flight -= 1
        replica.unreported.pop(request_id, None)
        if self._rule.tracks_active:
            for block_hash in dispatch.request.block_hashes:
                replica.active[block_hash] -= 1
                if not replica.active[block_hash]:
                    del replica.active[block_hash]

    def _forget(self, name: str) -> None:
        replica = self._replicas.pop(name, None)
        if replica is None:
            return
        for request_id in [i for i, d in self._dispatches.items() if d.candidate is replica]:
            del self._dispatches[request_id]
        self._index.forget(replica.row)
        self._rule.left(name)

    def _overloaded(self, request: RouteRequest, why: str, *, permanent: bool) -> Overloaded:
        return Overloaded(
            request_id=request.request_id, retry_after_s=RETRY_AFTER_S, why=why, permanent=permanent
        )
