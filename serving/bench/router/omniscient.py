"""The omniscient greedy router: it sees every replica as it is now, and every output's true length.

Each request goes where its first token would come first (`foresight.first_token_ms`), at once and
without a reservation. Greedy: it never spares later requests anything, nor knows which will come. It
is a reference, not a bound: a router that saves prefills for everybody's sake may do better.

Blocks that several running sequences share are counted as free when the first of them ends.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import cast

from cluster.load import ReplicaLoad
from serving.bench.router.foresight import Decode, Outlook, Prefill, first_token_ms
from serving.engine.sequence import SequenceState
from serving.messages import (
    BlockEvents,
    BlockSnapshot,
    DispatchUpdate,
    Overloaded,
    Route,
    RouteReply,
    RouteRequest,
)
from serving.simulator import SimSetup
from serving.simulator.engine import SimSequence
from serving.simulator.replica import SimulatedReplica

_TIE_MS = 1e-6
_NO_ANSWERS: list[tuple[str, RouteReply]] = []


@dataclass(frozen=True, slots=True)
class _Sent:
    """A request on its way to a replica."""

    replica: str
    request: RouteRequest
    matched_blocks: int
    there_s: float


class OmniscientRouter:
    """A policy; `behold` gives it its knowledge."""

    def __init__(self, number: int, setup: SimSetup) -> None:
        here = setup.router_regions[number] if setup.router_regions else setup.replicas[0].region
        self._way_ms = {spec.name: setup.rtt_s(here, spec.region) * 5e2 for spec in setup.replicas}
        self._hop_ms = setup.router_hop_ms / 2  # back to Ingress, from where the ways begin
        self._block_tokens = setup.block_tokens
        self._replicas: dict[str, SimulatedReplica] = {}
        self._sent: dict[str, _Sent] = {}  # by request id, while no replica is known to have it

    def behold(self, replicas: Sequence[SimulatedReplica]) -> None:
        """The replicas themselves, before anything happens."""
        self._replicas = {replica.spec.name: replica for replica in replicas}

    def request(self, request: RouteRequest, now: float) -> RouteReply:
        self._sent.pop(request.request_id, None)
        best: tuple[float, int, str, int] | None = None
        for name, replica in self._replicas.items():
            if replica.died_s is not None or name in request.refused_replicas:
                continue
            limit_ms = best[0] - self._way_ms[name] + _TIE_MS if best else math.inf
            candidate = self._candidate(request, name, replica, limit_ms, now)
            if best is None or candidate < best:
                best = candidate
        if best is None:
            return Overloaded(request_id=request.request_id, retry_after_s=1.0, why="no replica is left")
        ms, _, name, matched = best
        self._sent[request.request_id] = _Sent(name, request, matched, now + self._to_replica_ms(name) / 1e3)
        return Route(
            request_id=request.request_id,
            replica_id=name,
            region=self._replicas[name].spec.region,
            reserve_blocks=0,
            matched_blocks=matched,
            predicted_ms=ms,
            why="the earliest first token there is",
        )

    def _candidate(
        self, request: RouteRequest, name: str, replica: SimulatedReplica, limit_ms: float, now: float
    ) -> tuple[float, int, str, int]:
        """Milliseconds to the first token there, what is to break ties, and the blocks matched."""
        outlook, arrived = outlook_of(replica, now)
        on_their_way = [
            sent for key, sent in self._sent.items() if sent.replica == name and key not in arrived
        ]
        queued = [
            sequence.block_hashes[: sequence.prompt_tokens // self._block_tokens]
            for sequence in live_sequences(replica)
            if sequence.num_outputs == 0
        ]
        queued += [list(sent.request.block_hashes) for sent in on_their_way]
        matched = matched_blocks(request, replica, queued, self._block_tokens)
        outlook.queue += [
            self._prefill(sent.request, sent.matched_blocks, (sent.there_s - now) * 1e3)
            for sent in on_their_way
        ]
        mine = self._prefill(request, matched, self._to_replica_ms(name))
        ms = first_token_ms(outlook, mine, limit_ms)
        return ms + self._way_ms[name], -outlook.available_blocks, name, matched

    def _to_replica_ms(self, name: str) -> float:
        return self._hop_ms + self._way_ms[name]

    def _prefill(self, request: RouteRequest, matched: int, ready_ms: float) -> Prefill:
        """As the last in line of a replica that has so many of its blocks."""
        blocks = -(-request.prompt_tokens // self._block_tokens)
        return Prefill(
            computed=matched * self._block_tokens,
            total=request.prompt_tokens,
            left=request.max_tokens,
            blocks=blocks,
            missing_blocks=blocks - matched,
            ready_ms=ready_ms,
        )

    def update(self, update: DispatchUpdate, now: float) -> list[tuple[str, RouteReply]]:
        self._sent.pop(update.request_id, None)
        return _NO_ANSWERS

    def replica_reported(self, load: ReplicaLoad, now: float) -> list[tuple[str, RouteReply]]:
        return _NO_ANSWERS

    def replica_events(
        self, replica_id: str, epoch: int, news: BlockEvents | BlockSnapshot, now: float
    ) -> bool:
        return True

    def membership(self, ids: AbstractSet[str], now: float) -> list[tuple[str, RouteReply]]:
        return _NO_ANSWERS

    def tick(self, now: float) -> list[tuple[str, RouteReply]]:
        return _NO_ANSWERS


def live_sequences(replica: SimulatedReplica) -> list[SimSequence]:
    """Running ones, then those waiting, each in the order of service."""
    scheduler = replica.scheduler
    return cast("list[SimSequence]", [*scheduler.running, *scheduler.waiting])


def matched_blocks(
    request: RouteRequest, replica: SimulatedReplica, queued: list[list[bytes]], block_tokens: int
) -> int:
    """Leading blocks that are cached there, or will be: of prompts that are computed before it."""
    wanted = request.block_hashes[: (request.prompt_tokens - 1) // block_tokens]
    matched = len(replica.scheduler.pool.match(wanted))
    for hashes in queued:
        while matched < min(len(wanted), len(hashes)) and hashes[matched] == wanted[matched]:
            matched += 1  # hashes are chained: who has this one has all before it
    return matched


def outlook_of(replica: SimulatedReplica, now: float) -> tuple[Outlook, set[str]]:
    """The replica when the step under way ends, and the ids of the requests it has."""
    scheduler, spec = replica.scheduler, replica.spec
    chunks, ends_s = replica.step_under_way()
    outlook = Outlook(
        step=spec.step,
        block_tokens=scheduler.pool.block_tokens,
        max_step_tokens=spec.max_step_tokens,
        max_num_seqs=spec.max_num_seqs,
        available_blocks=scheduler.pool.num_available,
        busy_ms=max(0.0, ends_s - now) * 1e3,
    )
    ids = set()
    for sequence in live_sequences(replica):
        ids.add(str(sequence.number))
        tokens, computed = sequence.num_tokens, sequence.num_computed  # what the step does is in them
        if chunks is None and sequence.state is SequenceState.RUNNING:
            tokens, computed = tokens + 1, tokens
        left = min(sequence.end_tokens, sequence.most_tokens) - tokens
        held = len(sequence.block_table)
        if computed + 1 == tokens > sequence.prompt_tokens:
            if left > 0:
                outlook.decodes.append(Decode(left, tokens, held))
            else:
                outlook.available_blocks += held
            continue
        needed = scheduler.pool.blocks_for(tokens)
        missing = 0 if sequence.state is SequenceState.RUNNING else needed - held
        outlook.queue.append(Prefill(computed, tokens, max(0, left - 1), needed, missing))
    return outlook, ids
