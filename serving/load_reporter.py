"""Tells the Router of a replica's load: on change, at most every 50 ms, and once a second when idle."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from typing import Protocol

import msgspec

from cluster.load import ReplicaLoad
from serving.errors import ReplicaGone
from serving.messages import encode
from serving.transport import DelayLine

logger = logging.getLogger(__name__)

BUSY_INTERVAL_S = 0.05
IDLE_INTERVAL_S = 1.0


class Router(Protocol):
    async def call(self, method: str, *args: object) -> object: ...


class LoadReporter:
    """Keeps only the latest load: an older one is of no use to anybody."""

    def __init__(self, load: ReplicaLoad, router: Router, line: DelayLine) -> None:
        self._load = load
        self._router = router
        self._line = line
        self._sequence = 0
        self._changed = asyncio.Event()
        self._changed.set()

    def changed(self, load: ReplicaLoad) -> None:
        self._load = load
        self._changed.set()

    async def run(self) -> None:
        """Report until cancelled."""
        while True:
            with suppress(TimeoutError):  # idle: say so once a second, so that silence means death
                await asyncio.wait_for(self._changed.wait(), IDLE_INTERVAL_S)
            self._changed.clear()
            self._sequence += 1
            report = msgspec.structs.replace(self._load, sequence=self._sequence)
            try:
                await self._line.cross()
                await self._router.call("report", encode([report]))
            except ReplicaGone:
                logger.warning("the Router cannot be reached; the next report is due in a second")
                await asyncio.sleep(IDLE_INTERVAL_S)
            await asyncio.sleep(BUSY_INTERVAL_S)
