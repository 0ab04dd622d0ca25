"""What a simulated replica tells routers of itself, and when, as `serving.load_reporter` has it.

A report shows a frame: the replica as it is at the end of a step. After a step that changed something
it is told at most every 50 ms; now and then while only decodes go on; each second when nothing does.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import msgspec

from cluster.load import ReplicaLoad
from serving.engine.scheduler import LoadFigures
from serving.load_reporter import BUSY_INTERVAL_S, IDLE_INTERVAL_S
from serving.messages import BlockEvent, BlockEvents
from serving.simulator.agenda import Agenda
from serving.simulator.contract import MODEL, SimReplica
from serving.simulator.engine import SimScheduler

EPOCH = 1  # who dies stays dead

Tell = Callable[[ReplicaLoad, BlockEvents | None], None]
PutOff = Callable[[float], bool]
"""Given when a report is due: whether a step is under way, at whose end `report` is called instead."""


class Reports:
    """One replica's."""

    def __init__(
        self,
        spec: SimReplica,
        scheduler: SimScheduler,
        agenda: Agenda,
        decode_report_s: float,
        tell: Tell,
        put_off: PutOff,
    ) -> None:
        self.is_overdue = False  # one is to be made at the end of the step under way
        self.is_over = False  # the replica is dead
        self._spec = spec
        self._scheduler = scheduler
        self._agenda = agenda
        self._decode_report_s = decode_report_s
        self._tell = tell
        self._put_off = put_off
        self._num_reports = 0
        self._reported_s = 0.0
        self._due_s = 0.0  # when the next one is to be made, if nothing changes until then
        self._timer_s = math.inf
        self._frame: LoadFigures | None = None  # of a change that is not told yet
        self._news: list[BlockEvent] = []  # up to the last frame, not told yet
        self._num_told = 0  # block events

    def first(self) -> ReplicaLoad:
        """What it says when it has just started; from then on it reports by itself."""
        self._wait_until(IDLE_INTERVAL_S)
        return self._load(self._scheduler.load())

    def gather_news(self) -> None:
        """Called at the end of every step, as an engine drains its log once a step."""
        news = self._scheduler.pool.events.drain()
        if news is not None:
            if news.first_number != self._num_told + len(self._news) + 1:  # the log had to drop some
                self._news.clear()
                self._num_told = news.first_number - 1
            self._news += news.events

    def changed(self, now: float) -> None:
        """A frame that is worth telling; soon, if the last one was told just now."""
        if now >= self._reported_s + BUSY_INTERVAL_S:
            self.report(now)
        else:
            self._frame = self._scheduler.load()
            self._wait_until(min(self._due_s, self._reported_s + BUSY_INTERVAL_S))

    def report(self, now: float) -> None:
        """Tell the last frame."""
        figures, self._frame = self._frame, None
        self.is_overdue = False
        self._reported_s = now
        news = None
        if self._news:
            news = BlockEvents(first_number=self._num_told + 1, events=tuple(self._news))
            self._num_told += len(self._news)
            self._news.clear()
        self._tell(self._load(figures or self._scheduler.load()), news)
        self._wait_until(now + (self._decode_report_s if self._scheduler.has_work else IDLE_INTERVAL_S))

    def _wait_until(self, due_s: float) -> None:
        self._due_s = due_s
        if due_s < self._timer_s:  # else the timer set earlier goes off first, and is set anew
            self._timer_s = due_s
            self._agenda.at(due_s, self._timer, due_s)

    def _timer(self, set_to_s: float) -> None:
        if set_to_s != self._timer_s:
            return  # an earlier one has been set since
        self._timer_s = math.inf
        if self.is_over or self._agenda.is_closing:
            return
        if self._due_s > set_to_s:
            self._wait_until(self._due_s)
        elif self._frame is None and self._put_off(set_to_s):
            self.is_overdue = True
        else:
            self.report(self._agenda.now)

    def _load(self, figures: LoadFigures) -> ReplicaLoad:
        self._num_reports += 1
        return ReplicaLoad(
            **msgspec.structs.asdict(figures),
            replica_id=self._spec.name,
            model=MODEL,
            region=self._spec.region,
            epoch=EPOCH,
            sequence=self._num_reports,
            step=self._spec.step,
            num_observations=1 << 20,  # the model is the truth here
            max_step_tokens=self._spec.max_step_tokens,
            max_num_seqs=self._spec.max_num_seqs,
        )
