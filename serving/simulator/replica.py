"""One simulated replica: the engine's scheduler and block pool, steps that only take their time.

    submit, abort ──► scheduler ──schedule──► step ──its predicted ms──► complete ──► ended, first token
                          └──────── or a DecodeRun of many steps, cut short by whatever comes ──┘

What it tells routers, and when, is `reports.Reports`.
"""

from __future__ import annotations

from typing import Protocol, cast

import numpy as np

from cluster.load import ReplicaLoad
from serving.engine.block_pool import BlockPool
from serving.engine.limits import SchedulerLimits
from serving.engine.scheduled_step import Chunk, ScheduledStep
from serving.engine.sequence import Sequence
from serving.engine.step_time import StepShape
from serving.messages import BlockEvents, BlockSnapshot, FinishReason, SubmitReply
from serving.simulator.agenda import Agenda
from serving.simulator.contract import SimReplica, SimSetup
from serving.simulator.engine import DecodeRun, SimScheduler, SimSequence
from serving.simulator.pace import Pace
from serving.simulator.reports import Reports


class ReplicaEvents(Protocol):
    """Who is told what happens here, at the moment it does."""

    def first_token(self, sequence: Sequence, now: float) -> None: ...

    def ended(self, sequence: Sequence, reason: FinishReason, now: float) -> None: ...

    def reported(self, replica: SimulatedReplica, load: ReplicaLoad, news: BlockEvents | None) -> None: ...


class SimulatedReplica:
    def __init__(
        self, number: int, spec: SimReplica, setup: SimSetup, agenda: Agenda, events: ReplicaEvents
    ) -> None:
        self.number = number
        self.spec = spec
        self.died_s: float | None = None
        self.busy_s = 0.0
        self.prefill_tokens = 0
        self.num_preemptions = 0
        self.num_steps = self.num_run_steps = 0
        self._agenda = agenda
        self._events = events
        self._fast_forward = setup.fast_forward and not spec.pace
        self._pace = Pace(spec.pace) if spec.pace else None
        limits = SchedulerLimits(spec.max_num_seqs, spec.max_step_tokens, spec.max_context_tokens)
        self._scheduler = SimScheduler(BlockPool(spec.num_blocks, setup.block_tokens), limits)
        self._reports = Reports(
            spec,
            self._scheduler,
            agenda,
            setup.decode_report_s,
            lambda load, news: events.reported(self, load, news),
            self._put_off,
        )
        self._sequences: dict[str, SimSequence] = {}
        self._step: ScheduledStep | None = None  # at most one of these is under way
        self._step_ends_s = 0.0
        self._run: DecodeRun | None = None
        self._is_change = False  # the step under way is worth a report
        self._accepted_since_frame = False

        self._held_blocks = 0
        self._held_block_s = 0.0  # integral of the held blocks over time, up to:
        self._counted_s = 0.0

    # ---- requests -------------------------------------------------------------------------------

    def submit(self, sequence: SimSequence) -> SubmitReply:
        now = self._agenda.now
        self._cut_run(now)
        reply = self._scheduler.reserve(sequence, now)
        if sequence.arrival:  # the scheduler numbers whom it accepts
            self._sequences[sequence.request_id] = sequence
            self._accepted_since_frame = True
            self._count_blocks(now)
            if self._step is None:
                self._begin(now)
        return reply

    def abort(self, request_id: str) -> None:
        """Nobody wants it any more; unknown ids are ignored."""
        now = self._agenda.now
        if request_id not in self._sequences:
            return
        self._cut_run(now)
        self._scheduler.abort(request_id)
        if self._step is None:
            self._begin(now)

    def die(self) -> list[SimSequence]:
        """Stop for good; returns whose sequences are lost."""
        now = self._agenda.now
        if self._run is not None:
            self._end_run(self._run, self._run.steps_by(now))
        self._count_blocks(now)
        self.died_s = now
        self._reports.is_over = True
        self._step = None
        lost = list(self._sequences.values())
        self._sequences.clear()
        self._scheduler.end_all("lost", "the replica died")
        self._held_blocks = 0
        return lost

    @property
    def has_work(self) -> bool:
        return bool(self._sequences)

    # ---- steps ----------------------------------------------------------------------------------

    def _begin(self, now: float) -> None:
        """Start the next step, or as many as are all alike."""
        if self._fast_forward:
            self._run = self._scheduler.decode_run(now, self.spec.step)
            if self._run is not None:
                self._agenda.at(self._run.time_of(self._run.num_steps), self._run_ended, self._run)
                return
        self._begin_step(now)

    def _begin_step(self, now: float) -> None:
        """`now` may be in the past: the end of the step before."""
        step = self._scheduler.schedule(now)
        if step is None:
            self._end_aborted()
            return
        self._step = step
        self._count_blocks(self._agenda.now)
        shape = StepShape.of(step)
        seconds = (
            self.spec.step.predict_ms(shape.tokens, shape.kv_tokens, shape.num_logits, shape.attention_pairs)
            / 1e3
        )
        ends_s = now + seconds if self._pace is None else self._pace.end_of(now, seconds)
        self.busy_s += ends_s - now
        self.num_steps += 1
        self.num_preemptions += step.num_preemptions
        prefill_tokens = step.prefill_tokens
        self.prefill_tokens += prefill_tokens
        self._is_change = prefill_tokens > 0 or step.num_preemptions > 0
        self._step_ends_s = ends_s
        self._agenda.at(self._step_ends_s, self._step_ended, step)

    def _step_ended(self, step: ScheduledStep) -> None:
        if step is not self._step:
            return  # it died meanwhile
        now = self._agenda.now
        self._step = None
        drawn = [cast(SimSequence, chunk.sequence).next_token for chunk in step.chunks if chunk.wants_token]
        is_change = self._is_change or self._accepted_since_frame or self._reports.is_overdue
        for delta in self._scheduler.complete(step, np.array(drawn, dtype=np.int32), now):
            if delta.times is not None:
                self._events.first_token(self._sequences[delta.request_id], now)
            if delta.finish_reason is not None:
                is_change = True
                self._events.ended(self._sequences.pop(delta.request_id), delta.finish_reason, now)
        self._count_blocks(now)
        self._accepted_since_frame = False
        self._reports.gather_news()
        if is_change:
            self._reports.changed(now)
        self._begin(now)

    def _run_ended(self, run: DecodeRun) -> None:
        if run is not self._run:
            return  # it was cut short
        self._end_run(run, run.num_steps)
        if self._reports.is_overdue:
            self._reports.report(self._agenda.now)
        self._begin(self._agenda.now)

    def _cut_run(self, now: float) -> None:
        """Leave a run after the step under way, which then is a step like others."""
        if self._run is None:
            return
        run = self._run
        num_steps = run.steps_by(now)
        self._end_run(run, num_steps)
        self._begin_step(run.time_of(num_steps))

    def _end_run(self, run: DecodeRun, num_steps: int) -> None:
        self._bring_up_to(self._agenda.now)
        assert run.num_done == num_steps
        self._run = None
        self.num_run_steps += num_steps
        self.busy_s += run.time_of(num_steps) - run.start_s

    def _bring_up_to(self, now: float) -> None:
        """Do what a run has done by now."""
        if self._run is not None:
            self._scheduler.go_on(self._run, self._run.steps_by(now))
            self._count_blocks(now)
            self._reports.gather_news()

    def _end_aborted(self) -> None:
        for delta in self._scheduler.take_ends():
            assert delta.finish_reason is not None
            sequence = self._sequences.pop(delta.request_id)
            self._events.ended(sequence, delta.finish_reason, self._agenda.now)

    # ---- reports --------------------------------------------------------------------------------

    def report_first(self) -> ReplicaLoad:
        """What it says when it has just started; from then on it reports by itself."""
        return self._reports.first()

    def snapshot(self) -> BlockSnapshot:
        """Its cached blocks, after all news so far has been told."""
        self._bring_up_to(self._agenda.now)
        self._reports.gather_news()
        self._reports.report(self._agenda.now)
        return self._scheduler.pool.snapshot()

    def _put_off(self, due_s: float) -> bool:
        """Whether a report waits for the end of the step under way."""
        if self._run is not None:
            next_step = min(self._run.steps_by(due_s) + 1, self._run.num_steps)
            self._agenda.at(self._run.time_of(next_step), self._step_of_run_ended, self._run)
            return True
        return self._step is not None

    def _step_of_run_ended(self, run: DecodeRun) -> None:
        if run is self._run and self._reports.is_overdue:
            self._bring_up_to(self._agenda.now)
            self._reports.report(self._agenda.now)

    # ---- facts ----------------------------------------------------------------------------------

    @property
    def scheduler(self) -> SimScheduler:
        """As it is after the last whole step by now; for those who may see everything."""
        self._bring_up_to(self._agenda.now)
        return self._scheduler

    def step_under_way(self) -> tuple[tuple[Chunk, ...] | None, float]:
        """The chunks of the step that runs now and when it ends; None when it is one of a run's.

        Without a step, none and now.
        """
        now = self._agenda.now
        if self._run is not None:
            return None, self._run.time_of(min(self._run.num_steps, self._run.steps_by(now) + 1))
        return (self._step.chunks, self._step_ends_s) if self._step is not None else ((), now)

    def kv_utilisation(self) -> float:
        """Part of its blocks that sequences hold, now."""
        self._bring_up_to(self._agenda.now)
        return self._held_blocks / self.spec.num_blocks

    def mean_kv_utilisation(self, duration_s: float) -> float:
        return self._held_block_s / (self.spec.num_blocks * duration_s) if duration_s > 0 else 0.0

    def check_emptied(self) -> None:
        """Assert that it serves nobody and that every block is free or evictable."""
        assert not self._sequences and self._step is None and self._run is None
        assert not self._scheduler.has_work and self._scheduler.num_held_blocks == 0

    def check_integrity(self) -> None:
        """Assert that its scheduler's books agree, block by block."""
        self._scheduler.check_integrity()

    def _count_blocks(self, now: float) -> None:
        """Add up what was held since the last time, taken to have grown evenly in a run."""
        held = self._scheduler.num_held_blocks
        mean = self._held_blocks if self._run is None else (self._held_blocks + held) / 2
        self._held_block_s += mean * (now - self._counted_s)
        self._counted_s = now
        self._held_blocks = held
