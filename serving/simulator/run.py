"""The simulation: a load, a cluster and a policy in, what became of each request out.

    Journeys (Ingress) ──asks, tells──► Routers (policies) ◄──load, block events── replicas
        └──────────────────────────submit, tokens──────────────────────────────────────┘

All of it is acts on one agenda. The same setup, requests and policy give the same result, bit for bit.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from cluster.load import ReplicaLoad
from serving.background import keep_freed_memory
from serving.engine.sequence import Sequence as EngineSequence
from serving.messages import BlockEvents, FinishReason
from serving.simulator.agenda import Agenda
from serving.simulator.contract import DONE, MakePolicy, SimRequest, SimResult, SimSetup
from serving.simulator.journey import Journey
from serving.simulator.journeys import Journeys
from serving.simulator.replica import SimulatedReplica
from serving.simulator.routers import Routers

SAMPLE_S = 1.0
NUM_CHECKED = 64
"""Replicas whose books are gone through in the end: of ten thousand, that would take half a minute."""

OnProgress = Callable[[int, int], None]
"""Told how many requests have ended, of how many."""


def simulate(
    setup: SimSetup,
    requests: Sequence[SimRequest],
    make_policy: MakePolicy,
    on_progress: OnProgress | None = None,
) -> SimResult:
    """Serve `requests`, given in any order, by the setup's cluster.

    Raises KeyError when `setup.rtt_ms` lacks a pair of regions that is needed.
    """
    keep_freed_memory()
    with _no_garbage_collection():
        simulation = _Simulation(setup, requests, make_policy, on_progress)
        simulation.run()
        return simulation.result()


class _Simulation:
    def __init__(
        self,
        setup: SimSetup,
        requests: Sequence[SimRequest],
        make_policy: MakePolicy,
        on_progress: OnProgress | None,
    ) -> None:
        self._setup = setup
        self._on_progress = on_progress
        self._agenda = Agenda()
        self._replicas = [
            SimulatedReplica(number, spec, setup, self._agenda, self)
            for number, spec in enumerate(setup.replicas)
        ]
        self._by_name = {replica.spec.name: replica for replica in self._replicas}
        assert len(self._by_name) == len(self._replicas), "two replicas bear the same name"
        self._routers = Routers(setup, make_policy, self._agenda)
        self._journeys = Journeys(setup, self._agenda, self._routers, self._by_name)
        self._all = [Journey(request) for request in requests]
        self._arrivals = iter(sorted(self._all, key=lambda journey: journey.request.arrival_s))
        self._series: list[list[float]] = []

    def run(self) -> None:
        agenda = self._agenda
        self._routers.start(self._replicas)
        for at_s, name in self._setup.failures:
            agenda.at(at_s, self._replica_dies, self._by_name[name])
        for at_s, number in self._setup.router_failures:
            agenda.at(at_s, self._router_dies, number)
        agenda.at(0.0, self._sample)
        self._next_arrival()
        agenda.run()
        assert all(journey.is_over for journey in self._all), "a request was forgotten"
        alive = [replica for replica in self._replicas if replica.died_s is None]
        for replica in alive:
            replica.check_emptied()
        for replica in alive[:NUM_CHECKED]:
            replica.check_integrity()

    # ---- what the replicas tell (ReplicaEvents) -------------------------------------------------

    def first_token(self, sequence: EngineSequence, now: float) -> None:
        self._journeys.first_token(sequence, now)

    def ended(self, sequence: EngineSequence, reason: FinishReason, now: float) -> None:
        self._journeys.ended(sequence, reason, now)

    def reported(self, replica: SimulatedReplica, load: ReplicaLoad, news: BlockEvents | None) -> None:
        self._routers.reported(replica, load, news)

    # ---- what comes from outside ----------------------------------------------------------------

    def _next_arrival(self) -> None:
        journey = next(self._arrivals, None)
        if journey is not None:
            self._agenda.at(journey.request.arrival_s, self._arrive, journey)

    def _arrive(self, journey: Journey) -> None:
        self._next_arrival()
        self._journeys.begin(journey)

    def _replica_dies(self, replica: SimulatedReplica) -> None:
        if self._agenda.is_closing or replica.died_s is not None:
            return
        self._journeys.replica_died(replica)
        self._agenda.at(self._agenda.now + self._setup.detection_s, self._death_is_seen)

    def _death_is_seen(self) -> None:
        seen_s = self._agenda.now - self._setup.detection_s
        alive = (r for r in self._replicas if r.died_s is None or r.died_s > seen_s + 1e-9)
        self._routers.set_members({replica.spec.name for replica in alive})

    def _router_dies(self, number: int) -> None:
        if not self._agenda.is_closing:
            self._journeys.router_died(number)

    def _sample(self) -> None:
        """Once a simulated second: the use of KV, the progress, and whether all is over."""
        if self._journeys.num_over == len(self._all):
            self._agenda.is_closing = True
            return
        self._series.append([replica.kv_utilisation() for replica in self._replicas])
        if self._on_progress is not None:
            self._on_progress(self._journeys.num_over, len(self._all))
        self._agenda.at(self._agenda.now + SAMPLE_S, self._sample)

    # ---- the result -----------------------------------------------------------------------------

    def result(self) -> SimResult:
        setup, journeys, replicas = self._setup, self._all, self._replicas
        duration_s = self._journeys.last_end_s
        regions = tuple(dict.fromkeys(spec.region for spec in setup.replicas))
        number = [-1 if j.replica is None else j.replica.number for j in journeys]
        outcome = np.array([j.outcome for j in journeys], dtype=np.int8)
        tokens = np.array([j.output_tokens for j in journeys])
        arrival_s = np.array([j.request.arrival_s for j in journeys])
        first_s = np.array([j.first_token_s for j in journeys])
        last_s = np.array([j.last_token_s for j in journeys])
        is_done = outcome == DONE
        with np.errstate(invalid="ignore", divide="ignore"):
            tpot_s = np.where(is_done & (tokens > 1), (last_s - first_s) / (tokens - 1), np.nan)
        return SimResult(
            setup=setup,
            duration_s=duration_s,
            regions=regions,
            outcome=outcome,
            region=np.array(
                [-1 if n < 0 else regions.index(replicas[n].spec.region) for n in number], dtype=np.int16
            ),
            replica=np.array(number, dtype=np.int32),
            ttft_s=np.where(is_done, first_s - arrival_s, np.nan),
            tpot_s=tpot_s,
            e2e_s=np.where(is_done, last_s - arrival_s, np.nan),
            cached_tokens=np.array([j.cached_tokens for j in journeys]),
            queue_s=np.array([j.queue_s for j in journeys]),
            refusals=np.array([j.num_refusals for j in journeys]),
            preemptions=np.array([j.num_preemptions for j in journeys]),
            output_tokens=tokens,
            prefill_tokens=np.array([replica.prefill_tokens for replica in replicas]),
            busy_s=np.array([replica.busy_s for replica in replicas]),
            kv_utilisation=np.array([replica.mean_kv_utilisation(duration_s) for replica in replicas]),
            replica_preemptions=np.array([replica.num_preemptions for replica in replicas]),
            kv_utilisation_series=np.array(self._series, dtype=np.float32),
            counts={
                "acts": self._agenda.num_acts,
                "steps": sum(replica.num_steps for replica in replicas),
                "fast_forwarded_steps": sum(replica.num_run_steps for replica in replicas),
                "reports": self._routers.num_reports,
                "block_events": self._routers.num_block_events,
                "snapshots": self._routers.num_snapshots,
            },
        )


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Nothing here is cyclic garbage, and the collector would search millions of objects for some."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
