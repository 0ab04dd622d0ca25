"""What a simulation is of, and what comes out of it. The simulation itself is `run.simulate`.

Times are simulated seconds from 0, the load's first possible arrival. What reads `nan` in a result
did not happen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from cluster.load import ReplicaLoad, StepCoefficients
from serving.messages import BlockEvents, BlockSnapshot, DispatchUpdate, RouteReply, RouteRequest

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

SAME_REGION_RTT_MS = 0.5
MODEL = "simulated"
"""Every replica's model, and every request's."""


@dataclass(frozen=True, slots=True)
class SimRequest:
    """One request of the load. `number` is its place in it and its identity."""

    number: int
    arrival_s: float
    region: str  # where the client and its Ingress are
    tenant: str
    priority: int  # lower is served first
    prompt_tokens: int
    output_tokens: int  # its true length, which nobody is told; at most max_tokens are given out
    max_tokens: int
    block_hashes: tuple[bytes, ...]  # chained, one a full block of the prompt
    session: int = -1
    deadline_s: float = math.inf  # absolute
    output_hashes: tuple[bytes, ...] = ()
    """Of the full blocks after those of `block_hashes`, for whoever's prompt repeats this reply.

    Blocks without one are named like no others.
    """


@dataclass(frozen=True)
class SimReplica:
    name: str
    region: str
    num_blocks: int
    step: StepCoefficients
    max_step_tokens: int
    max_num_seqs: int
    max_context_tokens: int = 1 << 17
    pace: tuple[tuple[float, float], ...] = ()
    """Steps of a real machine, as (seconds taken, seconds foretold): it is as fast as that, over time, in
    the simulation too (`pace.Pace`). Without them every step takes what `step` says."""


@dataclass(frozen=True)
class SimSetup:
    """A cluster, its network and its misfortunes."""

    replicas: tuple[SimReplica, ...]
    block_tokens: int = 64
    rtt_ms: Mapping[tuple[str, str], float] = field(default_factory=dict)
    """Round trips between regions, in either order of the pair; within one, 0.5 ms unless given."""
    num_routers: int = 1
    router_regions: tuple[str, ...] = ()
    """Where each router stands; a request asks one of its own region, if there is any. Empty: all
    stand in the first replica's region, and serve every request."""
    staleness_ms: float = 0.0  # extra delay of every load report and block event on the way to a router
    router_hop_ms: float = 1.0  # round trip of Ingress and Router, besides the network's between regions
    seed: int = 0  # for the policies; nothing else here is random
    failures: tuple[tuple[float, str], ...] = ()  # (at_s, replica name): it dies and stays dead
    router_failures: tuple[tuple[float, int], ...] = ()  # (at_s, router number): dies and stays dead
    detection_s: float = 0.2  # from a replica's death until the routers' membership lacks it
    decode_report_s: float = 0.25
    """How often a replica reports in which nothing but decoding goes on; whatever else changes is
    reported within 50 ms, as replicas do. Real ones report decodes as often too: a simulation spends
    much of its time on that, and its figures hardly change (a replica's decodes grow by a token each
    some 20 ms)."""
    fast_forward: bool = True  # take runs of pure decode steps at once: the same times, sooner

    def rtt_s(self, one: str, other: str) -> float:
        """Round trip between two regions. Raises KeyError where nobody gave it."""
        rtt_ms = self.rtt_ms.get((one, other), self.rtt_ms.get((other, one)))
        if rtt_ms is None:
            if one != other:
                raise KeyError(f"rtt_ms lacks the round trip between {one} and {other}")
            rtt_ms = SAME_REGION_RTT_MS
        return rtt_ms / 1e3


class Policy(Protocol):
    """A router's decisions; `dispatcher.Dispatcher` is the production one."""

    def request(self, request: RouteRequest, now: float) -> RouteReply: ...

    def update(self, update: DispatchUpdate, now: float) -> list[tuple[str, RouteReply]]: ...

    def replica_reported(self, load: ReplicaLoad, now: float) -> list[tuple[str, RouteReply]]: ...

    def replica_events(
        self, replica_id: str, epoch: int, news: BlockEvents | BlockSnapshot, now: float
    ) -> bool:
        """False: some were missed, so a snapshot is to be sent."""
        ...

    def membership(self, ids: AbstractSet[str], now: float) -> list[tuple[str, RouteReply]]: ...

    def tick(self, now: float) -> list[tuple[str, RouteReply]]: ...


MakePolicy = Callable[[int, SimSetup], Policy]
"""The policy of the router of this number."""

DONE, REFUSED, LOST, LATE = range(4)
"""How a request ended: whole, Overloaded, its replica died, its deadline passed."""


@dataclass(frozen=True)
class SimResult:
    """Arrays by request are in the order of the requests given, by replica in the setup's."""

    setup: SimSetup
    duration_s: float  # until the last request had ended
    regions: tuple[str, ...]  # what `region` counts in

    outcome: NDArray[np.int8]  # [R] DONE, REFUSED, LOST or LATE
    region: NDArray[np.int16]  # [R] that served it; -1 none
    replica: NDArray[np.int32]  # [R] the last that accepted it; -1 none
    ttft_s: Floats  # [R] as the client sees it; nan unless DONE
    tpot_s: Floats  # [R] mean time between output tokens; nan unless DONE with two or more
    e2e_s: Floats  # [R] nan unless DONE
    cached_tokens: Ints  # [R] prompt tokens found in the prefix cache
    queue_s: Floats  # [R] from arrival to the first prefill chunk, without the way there; nan if none
    refusals: Ints  # [R] by replicas
    preemptions: Ints  # [R]
    output_tokens: Ints  # [R] given out

    prefill_tokens: Ints  # [N] computed, again after a preemption
    busy_s: Floats  # [N] in steps
    kv_utilisation: Floats  # [N] part of the blocks held by sequences, mean over the time
    replica_preemptions: Ints  # [N]
    kv_utilisation_series: NDArray[np.float32]  # [S, N] at 0, 1, 2, ... s

    counts: Mapping[str, int] = field(default_factory=dict)
    """Of events, steps, reports and the like: what the simulation did."""
