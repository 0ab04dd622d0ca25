"""Tells the Router of a replica's load and cache: on change, at most every 50 ms, and each second when idle.

Of the load only the latest counts; the cache's events are kept until they are told. Where some were
lost, here or there, a snapshot of all cached blocks takes their place.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Protocol

import msgspec

from cluster.load import ReplicaLoad
from serving.errors import ReplicaGone
from serving.messages import BlockEvents, BlockSnapshot, ReplicaReport, decode, encode
from serving.transport import DelayLine

logger = logging.getLogger(__name__)

BUSY_INTERVAL_S = 0.05
IDLE_INTERVAL_S = 1.0
MAX_PENDING_EVENTS = 1 << 15  # more than a snapshot of most caches


class Router(Protocol):
    async def call(self, method: str, *args: object) -> bytes: ...


class LoadReporter:
    def __init__(
        self,
        load: ReplicaLoad,
        router: Router,
        line: DelayLine,
        snapshot: Callable[[], Awaitable[BlockSnapshot]],
    ) -> None:
        """`snapshot` gives every cached block."""
        self._load = load
        self._router = router
        self._line = line
        self._snapshot = snapshot
        self._pending: list[BlockEvents] = []
        self._num_pending = 0
        self._needs_snapshot = False
        self._sequence = 0
        self._changed = asyncio.Event()
        self._changed.set()

    def changed(self, load: ReplicaLoad) -> None:
        self._load = load
        self._changed.set()

    def blocks_changed(self, events: BlockEvents) -> None:
        self._pending.append(events)
        self._num_pending += len(events.events)
        if self._num_pending > MAX_PENDING_EVENTS:  # the Router is away
            self._forget_events()
        self._changed.set()

    async def run(self) -> None:
        """Report until cancelled."""
        while True:
            with suppress(TimeoutError):  # idle: say so once a second, so that silence means death
                await asyncio.wait_for(self._changed.wait(), IDLE_INTERVAL_S)
            self._changed.clear()
            try:
                await self._report()
            except ReplicaGone:
                logger.warning("the Router cannot be reached; the next report is due in a second")
                self._forget_events()
                await asyncio.sleep(IDLE_INTERVAL_S)
            await asyncio.sleep(BUSY_INTERVAL_S)

    async def _report(self) -> None:
        blocks: tuple[BlockEvents | BlockSnapshot, ...] = ()
        if self._needs_snapshot:
            # Events of meanwhile are in it: those that it includes are skipped by their numbers.
            blocks = (await self._snapshot(),)
            self._needs_snapshot = False
        blocks += tuple(self._pending)
        self._pending, self._num_pending = [], 0
        self._sequence += 1
        load = msgspec.structs.replace(self._load, sequence=self._sequence)
        await self._line.cross()
        reply = await self._router.call("report", encode([ReplicaReport(load=load, blocks=blocks)]))
        if not decode(reply, bool):
            self._needs_snapshot = True
            self._changed.set()

    def _forget_events(self) -> None:
        self._pending, self._num_pending = [], 0
        self._needs_snapshot = True
