"""Several engines under the same loads, one at a time and taking turns, so that drift hits all alike."""

from __future__ import annotations

import itertools
import os
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import psutil

from serving.bench.engine.figures import Load, Sample
from serving.bench.engine.offline import BenchRequest, EngineUnderTest
from serving.bench.engine.peers import Peer, PeerFailed

WARM_UP_TOKENS = 2
SETTLE_S = 0.4  # Intel's OpenMP threads spin for 0.2 s after their last work
IDLE_CORE_SHARE = 0.05

Prompts = list[tuple[int, ...]]


class Engine(Protocol):
    """Something that generates. Several may live in one process, told by `pid`."""

    name: str

    @property
    def pid(self) -> int: ...

    def run(self, prompts: Prompts, new_tokens: int) -> Sample:
        """Raises PeerFailed when it cannot."""
        ...


class OurEngine:
    """Searoom's engine in this process."""

    def __init__(self, name: str, under_test: EngineUnderTest) -> None:
        self.name = name
        self.under_test = under_test

    @property
    def pid(self) -> int:
        return os.getpid()

    def run(self, prompts: Prompts, new_tokens: int) -> Sample:
        record = self.under_test.run([BenchRequest(prompt, new_tokens) for prompt in prompts])
        return Sample(
            elapsed_s=record.elapsed_s,
            token_times_s=tuple(request.token_times_s for request in record.requests),
            output_ids=tuple(request.output_ids for request in record.requests),
            steps=record.steps,
            forward_ms=record.forward_ms,
        )


class PeerEngine:
    """A peer in its own process."""

    def __init__(self, name: str, peer: Peer) -> None:
        self.name = name
        self.peer = peer

    @property
    def pid(self) -> int:
        return self.peer.pid

    def run(self, prompts: Prompts, new_tokens: int) -> Sample:
        output = self.peer.generate([list(prompt) for prompt in prompts], new_tokens)
        return Sample(output.elapsed_s, output.token_times_s, output.output_ids)


@dataclass
class Results:
    """Samples by engine and load, in the order of the repeats, on the same prompts for every engine."""

    samples: dict[tuple[str, Load], list[Sample]] = field(default_factory=lambda: defaultdict(list))
    failures: dict[str, str] = field(default_factory=dict)
    idle_shares: dict[str, float] = field(default_factory=dict)  # most of a core used while another ran


def compare(
    engines: Sequence[Engine],
    loads: Sequence[Load],
    prompts_of: Callable[[Load], Prompts],
    repeats: int,
    *,
    beside: Callable[[Load], None] = lambda load: None,
    on_run: Callable[[Load, str], None] = lambda load, name: None,
    settle_s: float = SETTLE_S,
) -> Results:
    """Run every load `repeats` times on every engine, each time with new prompts and another one first.

    The first run of a load on an engine is a short one that is not counted. An engine that fails takes
    no further part. `beside` is called once a repeat, to measure something at the same time of day;
    `on_run` before each run.
    """
    results = Results()
    for load in loads:
        for repeat in range(-1, repeats):
            prompts = prompts_of(load)
            new_tokens = min(WARM_UP_TOKENS, load.new_tokens) if repeat < 0 else load.new_tokens
            for engine in rotated([e for e in engines if e.name not in results.failures], repeat):
                on_run(load, engine.name)
                time.sleep(settle_s)
                try:
                    with _Watch(engine, engines, results):
                        sample = engine.run(prompts, new_tokens)
                except PeerFailed as failure:
                    results.failures[engine.name] = str(failure)
                    continue
                if repeat >= 0:
                    results.samples[engine.name, load].append(sample)
            if repeat >= 0:
                time.sleep(settle_s)
                beside(load)
    return results


def rotated(engines: Sequence[Engine], turn: int) -> list[Engine]:
    """`engines` in their order, beginning with another one each turn."""
    start = max(turn, 0) % max(len(engines), 1)
    return list(itertools.chain(engines[start:], engines[:start]))


class _Watch:
    """Notes what the other processes use of a core while one engine runs."""

    def __init__(self, engine: Engine, engines: Sequence[Engine], results: Results) -> None:
        self._others = [
            other for other in engines if other.pid != engine.pid and other.name not in results.failures
        ]
        self._idle_shares = results.idle_shares

    def __enter__(self) -> None:
        self._started_s = time.perf_counter()
        self._before_s = [_cpu_s(other.pid) for other in self._others]

    def __exit__(self, *_: object) -> None:
        elapsed_s = time.perf_counter() - self._started_s
        for other, before_s in zip(self._others, self._before_s, strict=True):
            share = (_cpu_s(other.pid) - before_s) / max(elapsed_s, 1.0)
            self._idle_shares[other.name] = max(share, self._idle_shares.get(other.name, 0.0))


def _cpu_s(pid: int) -> float:
    try:
        times = psutil.Process(pid).cpu_times()
    except psutil.NoSuchProcess:  # it has just failed
        return 0.0
    return float(times.user + times.system)
