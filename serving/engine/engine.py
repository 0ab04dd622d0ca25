"""The engine: schedule, run, publish. It knows token ids and blocks, not text, HTTP or tensors.

    submit, abort, drain, load ── any thread ──┐
                                               ├─ one short lock ── Scheduler
    step: schedule ─► launch ─► complete ──────┘
                      (unlocked)

Where the executor runs ahead, a step is launched before the one before it is complete: its sequences' new
tokens are read on the device, and the host's work is hidden behind the device's. A step is decided on
without knowing who ends in the one before, so a sequence that meets a stop token is computed once more.

    host     schedule 2, launch ─ wait for 1 ─ complete 1, publish ─ schedule 3, launch ─ wait for 2 ─ ...
    device   ──── 1 ──────────────────────────┼──── 2 ───────────────────────────────────────┼──── 3 ...

Every accepted request ends with exactly one delta that has a finish reason, whatever happens.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec

from cluster.load import ReplicaLoad
from serving.engine.executor import Executor, Launched
from serving.engine.governor import Governor, RunningLoad, StepBudget
from serving.engine.scheduled_step import ScheduledStep, build_plan
from serving.engine.scheduler import Scheduler
from serving.engine.sequence import Sequence as EngineSequence
from serving.engine.step_time import StepShape, StepTimeModel
from serving.messages import (
    BlockSnapshot,
    Refused,
    SequenceDelta,
    StepFrame,
    StepStats,
    Submit,
    SubmitReply,
)

IDLE_INTERVAL_S = 30.0
STOPPED = "the engine has stopped"


@dataclass(frozen=True, slots=True)
class EngineIdentity:
    """How load reports name this engine. `epoch` changes when its process does."""

    replica_id: str
    model: str
    region: str
    epoch: int


@dataclass(frozen=True, slots=True)
class _Flight:
    """A launched step, and when its scheduling began and ended."""

    step: ScheduledStep
    launched: Launched
    started_s: float
    scheduled_s: float


class Engine:
    """Thread-safe; `step` and `run` belong to one thread, the step thread. `clock` gives seconds."""

    def __init__(
        self,
        scheduler: Scheduler,
        executor: Executor,
        step_time: StepTimeModel,
        identity: EngineIdentity,
        clock: Callable[[], float] = time.perf_counter,
        governor: Governor | None = None,
    ) -> None:
        self._scheduler = scheduler
        self._executor = executor
        self._step_time = step_time
        self._identity = identity
        self._clock = clock
        self._governor = governor
        self._last_finished_s = -math.inf
        self._block_tokens = scheduler.pool.block_tokens
        self._flights: deque[_Flight] = deque()  # the step thread's
        self._wake = threading.Condition(threading.Lock())  # guards everything below, and the scheduler
        self._is_stale = True  # the load has changed since the last frame, with no step to tell it
        self._is_draining = False
        self._is_stopping = False
        self._is_closed = False
        self._is_asleep = False  # the executor has given its memory back
        self._last_step = 0
        self._last_report = 0

    # ---- any thread -----------------------------------------------------------------------------

    def submit(self, submits: Sequence[Submit]) -> list[SubmitReply]:
        """Reserve and queue each request, or refuse it; answers in the same order.

        A duplicate of a live id and an empty prompt are refused for good.
        """
        sequences = [EngineSequence.from_submit(submit, self._block_tokens) for submit in submits]
        with self._wake:
            if self._is_closed:
                return [
                    Refused(request_id=submit.request_id, headroom_blocks=0, why=STOPPED)
                    for submit in submits
                ]
            now_s = self._clock()
            replies = [self._scheduler.reserve(sequence, now_s) for sequence in sequences]
            self._wake.notify()
            return replies

    def abort(self, request_ids: Sequence[str]) -> None:
        """End these requests with "abort" in one of the next frames; ids not live are ignored."""
        with self._wake:
            for request_id in request_ids:
                self._scheduler.abort(request_id)
            self._wake.notify()

    def load(self) -> ReplicaLoad:
        """The load at this instant, as the next report in sequence."""
        with self._wake:
            return self._report()

    def block_snapshot(self) -> BlockSnapshot:
        """Every cached block, for whoever missed some of the frames' block events."""
        with self._wake:
            return self._scheduler.pool.snapshot()

    def drain(self) -> None:
        """Say in load reports that no more work should come. What comes nevertheless is served."""
        with self._wake:
            self._is_draining = self._is_stale = True
            self._wake.notify()

    def stop(self) -> None:
        """Make `run` end after the step in flight; what is unfinished then ends as lost."""
        with self._wake:
            self._is_stopping = True
            self._wake.notify()

    def check_integrity(self) -> None:
        with self._wake:
            self._scheduler.check_integrity()

    # ---- the step thread ------------------------------------------------------------------------

    def step(self) -> StepFrame | None:
        """Complete a step, with the next one on its way; None when there is nothing to do or to tell."""
        if not self._flights:
            self._launch_next()
        if not self._flights:
            with self._wake:
                return self._frame_without_step()
        if self._executor.runs_ahead:
            self._launch_next()
        flight = self._flights.popleft()
        token_ids = flight.launched.tokens()
        with self._wake:
            finished_s = self._clock()
            deltas = self._scheduler.complete(flight.step, token_ids, finished_s)
            return self._frame(flight.step.number, deltas, self._observe(flight, finished_s))

    def _launch_next(self) -> None:
        started_s = self._clock()
        with self._wake:
            step = self._scheduler.schedule(started_s, self._budget())
        if step is not None:
            plan, sampling = build_plan(step, self._block_tokens)
            scheduled_s = self._clock()
            launched = self._executor.launch(plan, sampling)
            self._flights.append(_Flight(step, launched, started_s, scheduled_s))

    def run(
        self,
        publish: Callable[[StepFrame], None],
        idle: Callable[[], None] | None = None,
        sleep_after_s: float | None = None,
    ) -> None:
        """Step and publish until `stop`, waiting while there is nothing to do.

        `idle` is called whenever 30 s pass without work, for a keep-alive among ranks. When `sleep_after_s`
        have passed so, the executor gives its memory back until the next request comes. However this
        ends, an error of the executor included (which is raised), every live request is told so.
        """
        try:
            while self._wait_for_work(idle, sleep_after_s):
                frame = self.step()
                if frame is not None:
                    publish(frame)
        finally:
            publish(self._close())

    def _wait_for_work(self, idle: Callable[[], None] | None, sleep_after_s: float | None) -> bool:
        """Wait until there is something to do, and something to do it with; False when it is to stop."""
        until_asleep_s = math.inf if sleep_after_s is None else sleep_after_s
        while True:
            timeout_s = min(math.inf if idle is None else IDLE_INTERVAL_S, until_asleep_s)
            with self._wake:
                has_work = self._wake.wait_for(
                    lambda: self._is_stopping or self._is_stale or self._scheduler.has_work,
                    timeout=None if timeout_s == math.inf else timeout_s,
                )
                if has_work:
                    wakes = self._is_asleep and self._scheduler.has_work and not self._is_stopping
                    if wakes:
                        self._is_asleep = False
                    break
            until_asleep_s -= timeout_s
            if idle is not None:
                idle()
            if until_asleep_s <= 0:
                self._fall_asleep()
                until_asleep_s = math.inf
        if wakes:
            self._executor.wake()
        return not self._is_stopping

    def _fall_asleep(self) -> None:
        with self._wake:
            if self._is_asleep or self._scheduler.has_work:  # a request has come meanwhile
                return
            copies = self._scheduler.pool.evict_all()
            self._is_asleep = self._is_stale = True
        self._executor.sleep(copies)

    def _close(self) -> StepFrame:
        with self._wake:
            self._is_closed = self._is_draining = True
            return self._frame(self._last_step, self._scheduler.end_all("lost", STOPPED), None)

    # ---- frames; the lock is held ---------------------------------------------------------------

    def _frame_without_step(self) -> StepFrame | None:
        deltas = self._scheduler.take_ends()
        return self._frame(self._last_step, deltas, None) if deltas or self._is_stale else None

    def _frame(self, step: int, deltas: tuple[SequenceDelta, ...], stats: StepStats | None) -> StepFrame:
        self._last_step = step
        self._is_stale = False
        report = self._report()
        return StepFrame(
            step=step,
            deltas=deltas,
            load=report,
            stats=stats,
            next_step_ms=self._next_step_ms(report),
            block_events=self._scheduler.pool.events.drain(),
        )

    def _report(self) -> ReplicaLoad:
        self._last_report += 1
        return ReplicaLoad(
            **msgspec.structs.asdict(self._scheduler.load()),
            replica_id=self._identity.replica_id,
            model=self._identity.model,
            region=self._identity.region,
            epoch=self._identity.epoch,
            sequence=self._last_report,
            step=self._step_time.coefficients,
            num_observations=self._step_time.num_observations,
            max_step_tokens=self._scheduler.limits.max_step_tokens,
            max_num_seqs=self._scheduler.limits.max_num_seqs,
            draining=self._is_draining,
            asleep=self._is_asleep,
        )

    def _next_step_ms(self, report: ReplicaLoad) -> float:
        """Prediction for the fullest step there can be: what comes next may be submitted meanwhile."""
        tokens, kv_tokens = report.max_step_tokens, report.decode_kv_tokens + report.max_step_tokens
        pairs = report.decode_kv_tokens + tokens * tokens / 2
        return report.step.predict_ms(tokens, kv_tokens, self._scheduler.limits.max_num_seqs, pairs)

    def _budget(self) -> StepBudget | None:
        if self._governor is None:
            return None
        load = RunningLoad.of(self._scheduler.running)
        return self._governor.budget(load, self._step_time.coefficients, self._step_time.usual_error)

    def _observe(self, flight: _Flight, finished_s: float) -> StepStats:
        """Teach the step-time model this step, and say what was expected of it before.

        A step's time is what it adds to the one before: launched ahead, it begins when that one ends.
        """
        step = flight.step
        self._step_time.bytes_per_weight = self._executor.bytes_per_weight
        shape = StepShape.of(step)
        predicted_ms = self._step_time.predict_ms(shape)
        step_ms = (finished_s - max(flight.started_s, self._last_finished_s)) * 1e3
        if step_ms > 0 and not step.copies:  # a coarse clock may not have moved; copies are no part of it
            self._step_time.observe(shape, step_ms)
        if self._governor is not None and step.decode_tokens:  # then there was a step just before
            self._governor.observe((finished_s - self._last_finished_s) * 1e3, predicted_ms)
        self._last_finished_s = finished_s
        flops, bytes_moved = self._step_time.flops(shape), self._step_time.bytes_moved(shape)
        machine = self._step_time.machine
        return StepStats(
            step_ms=step_ms,
            predicted_ms=predicted_ms,
            schedule_ms=(flight.scheduled_s - flight.started_s) * 1e3,
            batch_size=len(step.chunks),
            prefill_tokens=step.prefill_tokens,
            decode_tokens=step.decode_tokens,
            flops=flops,
            bytes_moved=bytes_moved,
            floor_ms=machine.floor_ms(flops, bytes_moved),
            ridge_flop_per_byte=machine.ridge_flop_per_byte,
            bound=machine.bound(flops, bytes_moved),
            num_preemptions=step.num_preemptions,
            prefix_hit_tokens=step.prefix_hit_tokens,
            prefix_query_tokens=step.prefix_query_tokens,
            host_hit_tokens=step.host_hit_tokens,
        )
