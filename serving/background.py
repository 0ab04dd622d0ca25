"""Tasks that run as long as their owner does. None dies unnoticed: its error fails the health check."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

logger = logging.getLogger(__name__)


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
