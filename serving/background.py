"""What a process that runs for days needs: tasks that do not die unnoticed, and quiet memory.

A task runs as long as its owner does; its error fails the health check.
"""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import Coroutine
from typing import Any

import numpy as np

logger = logging.getLogger(__name__)

COLLECTOR_THRESHOLDS = (50_000, 50, 100)
"""Of `gc.set_threshold`: cycles are few here, and a pass over everything is long."""

LARGEST_KEPT_BYTES = (32 << 20) - (1 << 16)
"""glibc's own limit, `DEFAULT_MMAP_THRESHOLD_MAX`, less a margin for its header."""


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


def keep_freed_memory() -> None:
    """Have the C library keep what is freed, where arrays of 100 KB come and go thousands of times a second.

    glibc hands the end of its heap back to the kernel as soon as 128 KiB of it are free, and each page that
    is taken again is a fault. It raises that limit, to twice the size, when a block that it had mapped by
    itself is freed (mallopt(3), M_MMAP_THRESHOLD). With other C libraries nothing changes.
    """
    np.empty(LARGEST_KEPT_BYTES, dtype=np.uint8)
