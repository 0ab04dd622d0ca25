"""One run: sessions sent in an open or a closed loop, until a limit is reached.

open      a session starts when it is due, however slow the answers are
closed    so many streams; each sends its next request when its last one is answered
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Coroutine, Iterator
from dataclasses import dataclass

from serving.bench.load.client import Client, Messages, Target
from serving.bench.load.record import Record
from serving.bench.load.sessions import Session

LOOKAHEAD_SESSIONS = 64
IDLE_S = 0.005
"""Texts are made ahead of their time, but only while nothing is due within this."""
FAILURE_PAUSE_S = 0.5
"""A closed loop's stream waits so long after a failure, or it would hammer a dead server."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Nothing is sent after so many requests, or after so long; what was sent is waited for."""

    requests: int | None = None
    duration_s: float | None = None


class Run:
    """A run under way, and what came of it."""

    def __init__(self, target: Target, limits: Limits) -> None:
        self.records: list[Record] = []
        self.num_pieces = 0  # of text so far; most servers send one a token
        self.is_interrupted = False
        self.elapsed_s = math.nan  # from the start to the last answer; known at the end
        self.cpu_s = math.nan  # of this process in that time
        self._limits = limits
        self._started_s = time.perf_counter()
        self._client = Client(target, self.now_s, self._heard)

    def now_s(self) -> float:
        """Seconds since the run began."""
        return time.perf_counter() - self._started_s

    async def open_loop(self, sessions: Iterator[Session]) -> None:
        """Start each session when it is due. Returns when all is answered, or when it is cancelled."""
        await self._measured(self._start_when_due(sessions))

    async def closed_loop(self, sessions: Iterator[Session], num_streams: int) -> None:
        """Keep so many streams busy. Returns when all is answered, or when it is cancelled."""
        await self._measured(self._streams(sessions, num_streams))

    async def _measured(self, loop: Coroutine[None, None, None]) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._started_s = time.perf_counter()
        cpu_started_s = time.process_time()
        try:
            async with self._client:
                await loop
        except asyncio.CancelledError:  # Ctrl-C: what there is becomes the result
            task.uncancel()
            self.is_interrupted = True
        self.elapsed_s = self.now_s()
        self.cpu_s = time.process_time() - cpu_started_s

    async def _start_when_due(self, sessions: Iterator[Session]) -> None:
        async with asyncio.TaskGroup() as tasks:
            async for session in self._when_due(sessions):
                record = self._record(session, 0, session.start_s)
                if record is None:
                    return
                tasks.create_task(self._converse(session, record))

    async def _when_due(self, sessions: Iterator[Session]) -> AsyncIterator[Session]:
        """Each session at its time, or as soon after it as this program can."""
        ahead: deque[Session] = deque()
        while True:
            while len(ahead) < LOOKAHEAD_SESSIONS and (not ahead or ahead[0].start_s - self.now_s() > IDLE_S):
                session = next(sessions, None)
                if session is None:
                    break
                ahead.append(session)
                await asyncio.sleep(0)  # answers are read in between
            if not ahead or self._is_over(ahead[0].start_s):
                return
            await asyncio.sleep(max(0.0, ahead[0].start_s - self.now_s()))
            yield ahead.popleft()

    async def _streams(self, sessions: Iterator[Session], num_streams: int) -> None:
        async def stream() -> None:
            for session in sessions:
                record = self._record(session, 0, self.now_s())
                if record is None:
                    return
                await self._converse(session, record)
                if record.state != "ok":
                    await asyncio.sleep(FAILURE_PAUSE_S)

        async with asyncio.TaskGroup() as tasks:
            for _ in range(num_streams):
                tasks.create_task(stream())

    async def _converse(self, session: Session, record: Record) -> None:
        """The session's turns, of which `record` is the first's; a failure ends it."""
        messages: Messages = [{"role": "system", "content": session.system}] if session.system else []
        for number, turn in enumerate(session.turns):
            if number:
                due_s = self.now_s() + turn.think_s
                if self._is_over(due_s):
                    return
                await asyncio.sleep(turn.think_s)
                later = self._record(session, number, due_s)
                if later is None:
                    return
                record = later
            messages.append({"role": "user", "content": turn.text})
            answer = await self._client.ask(record, messages, turn.max_tokens)
            if record.state != "ok":
                return
            messages.append({"role": "assistant", "content": answer})

    def _record(self, session: Session, turn: int, due_s: float) -> Record | None:
        """A place among the requests; None when the limits leave none."""
        if self._is_over(due_s):
            return None
        record = Record(session.number, turn, due_s)
        self.records.append(record)
        return record

    def _is_over(self, due_s: float) -> bool:
        requests, duration_s = self._limits.requests, self._limits.duration_s
        if requests is not None and len(self.records) >= requests:
            return True
        return duration_s is not None and due_s >= duration_s

    def _heard(self) -> None:
        self.num_pieces += 1
