"""What a process that runs for days needs: tasks that do not die unnoticed, and a quiet garbage collector.

A task runs as long as its owner does; its error fails the health check.
"""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import Coroutine
from typing import Any

logger = logging.getLogger(__name__)

COLLECTOR_THRESHOLDS = (50_000, 50, 100)
"""Of `gc.set_threshold`: cycles are few here, and a pass over everything is long."""


class Background:
    """An owner's endless tasks. One that ends by itself is a failure, whatever ended it."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()
        self._failure: str | None = None

    def start(self, running: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.create_task(running, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def check(self) -> None:
        """For a `check_health`: raises RuntimeError when a task has ended."""
        if self._failure is not None:
            raise RuntimeError(self._failure)

    def close(self) -> None:
        for task in self._tasks:
            task.cancel()

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if task.cancelled():
            return
        error = task.exception()
        self._failure = f"the task {task.get_name()!r} ended: {type(error).__name__}"
        logger.error(self._failure, exc_info=error)


def collect_rarely() -> None:
    """Leave what stands now to the end of the process, and look for cycles in the rest less often.

    A full collection walks every container: of a process with millions of small ones, for milliseconds.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*COLLECTOR_THRESHOLDS)
