"""How long one decision takes: the production `Dispatcher`, a long prompt, fleets of several sizes."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass

import msgspec
import numpy as np
from rich.console import Console
from rich.table import Table

from cluster.load import ReplicaLoad, StepCoefficients
from serving.background import collect_rarely, keep_freed_memory
from serving.dispatcher import Dispatcher, DispatcherLimits
from serving.messages import BlockSnapshot, DispatchUpdate, Route, RouteRequest

BLOCK_TOKENS = 16
PROMPT_TOKENS = 32_768
SYSTEM_BLOCKS = 64  # that every session begins with, and every replica holds
SESSION_BLOCKS = 500  # of an earlier turn, held by some replicas
NUM_SESSIONS = 200
NUM_DECISIONS = 1000
NUM_WARM = 50
RTT_MS = 1.0  # as Ingress measured it
TARGETS_MS = {64: 0.5, 1000: 2.0}  # p99
SIZES = (64, 1000, 10_000)


@dataclass(frozen=True)
class DecisionTimes:
    num_replicas: int
    p50_ms: float
    p99_ms: float

    @property
    def target_ms(self) -> float | None:
        return TARGETS_MS.get(self.num_replicas)


def measure(num_replicas: int, num_decisions: int = NUM_DECISIONS) -> DecisionTimes:
    """Decisions on prompts of which some replicas hold a part; between two, a report and two updates."""
    rng = random.Random(0)
    names = [f"replica-{number}" for number in range(num_replicas)]
    loads = {name: _load(name, number, rng) for number, name in enumerate(names)}
    system, sessions = (
        _hashes("system", SYSTEM_BLOCKS),
        [_hashes(f"s{n}", SESSION_BLOCKS) for n in range(NUM_SESSIONS)],
    )
    dispatcher = Dispatcher(DispatcherLimits(), {"near": 0.5, "far": 75.0}, block_tokens=BLOCK_TOKENS)
    now = 1_000.0
    dispatcher.membership(set(names), now)
    for number, name in enumerate(names):
        dispatcher.replica_reported(loads[name], now)
        held = system + sessions[number % NUM_SESSIONS]
        dispatcher.replica_events(name, 1, BlockSnapshot(last_number=1, block_hashes=held), now)
    collect_rarely()  # as the Router does
    keep_freed_memory()
    times_ms = []
    for number in range(NUM_WARM + num_decisions):
        now += 0.01
        reported = names[number % num_replicas]
        loads[reported] = msgspec.structs.replace(loads[reported], sequence=number + 2)
        dispatcher.replica_reported(loads[reported], now)
        request = _request(number, system + sessions[number % NUM_SESSIONS])
        start_s = time.perf_counter()
        reply = dispatcher.request(request, now)
        times_ms.append(1000 * (time.perf_counter() - start_s))
        assert isinstance(reply, Route)
        for update in _updates(reply, number):
            dispatcher.update(update, now)
    p50_ms, p99_ms = np.percentile(times_ms[NUM_WARM:], (50, 99)).tolist()
    return DecisionTimes(num_replicas, p50_ms, p99_ms)


def _updates(route: Route, submission: int) -> tuple[DispatchUpdate, DispatchUpdate]:
    """What Ingress tells of a request, from which a Router learns."""
    request_id, replica_id = route.request_id, route.replica_id
    return (
        DispatchUpdate(
            request_id=request_id,
            replica_id=replica_id,
            outcome="accepted",
            submission=submission,
            rtt_ms=RTT_MS,
        ),
        DispatchUpdate(
            request_id=request_id,
            replica_id=replica_id,
            outcome="finished",
            output_tokens=100,
            is_whole=True,
            ttft_ms=route.predicted_ms,
        ),
    )


def measure_decisions(console: Console) -> None:
    """A table of all sizes, with the targets there are."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("replicas", "p50 ms", "p99 ms", "target", ""):
        table.add_column(name, justify="right")
    for size in SIZES:
        with console.status(f"{NUM_DECISIONS} decisions among {size} replicas"):
            times = measure(size)
        target_ms = times.target_ms
        verdict = "" if target_ms is None else "pass" if times.p99_ms <= target_ms else "[red]FAIL[/]"
        wanted = "" if target_ms is None else f"<= {target_ms}"
        table.add_row(str(size), f"{times.p50_ms:.3f}", f"{times.p99_ms:.3f}", wanted, verdict)
    console.print(
        f"one decision on a prompt of {PROMPT_TOKENS} tokens, {PROMPT_TOKENS // BLOCK_TOKENS} block hashes"
    )
    console.print(table)


def _hashes(seed: str, count: int) -> tuple[bytes, ...]:
    rng = random.Random(seed)
    return tuple(rng.randbytes(16) for _ in range(count))


def _load(name: str, number: int, rng: random.Random) -> ReplicaLoad:
    running = rng.randrange(30)
    return ReplicaLoad(
        replica_id=name,
        model="m",
        region=("near", "far")[number % 2],
        epoch=1,
        sequence=1,
        last_submission=0,
        blocks_total=20_000,
        blocks_free=100,
        blocks_evictable=15_000,
        blocks_reserved=1000,
        num_running=running,
        num_waiting=0,
        prefill_backlog_tokens=rng.randrange(3000),
        decode_kv_tokens=1000 * running,
        step=StepCoefficients(10.0, 0.06, 1e-4),
        num_observations=1000,
        max_step_tokens=2048,
        max_num_seqs=256,
    )


def _request(number: int, cached: tuple[bytes, ...]) -> RouteRequest:
    hashes = cached + _hashes(f"new {number}", PROMPT_TOKENS // BLOCK_TOKENS - len(cached))
    return RouteRequest(
        request_id=f"q{number}",
        ingress_id="ingress",
        model="m",
        tenant_key=f"t{number % 50}",
        deadline_s=1e9,
        prompt_tokens=PROMPT_TOKENS,
        max_tokens=300,
        block_hashes=hashes,
    )
