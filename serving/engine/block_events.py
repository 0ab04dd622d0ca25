"""What became cached and what ceased to be, numbered, for whoever keeps an index of a replica's blocks.

    BlockPool ─record─► BlockEventLog ─drain, once a step─► StepFrame.block_events

Memory is bounded: when nobody drains, the oldest events are dropped. The numbers tell: who has seen
event n and is given a batch that begins past n + 1 has missed some, and starts again from a snapshot.
"""

from __future__ import annotations

from collections import deque

from serving.messages import BlockEvent, BlockEvents

MAX_PENDING = 1 << 14


class BlockEventLog:
    """Events are numbered from 1."""

    def __init__(self, max_pending: int = MAX_PENDING) -> None:
        self.last_number = 0
        self._pending: deque[BlockEvent] = deque(maxlen=max_pending)

    def record(self, event: BlockEvent) -> None:
        self.last_number += 1
        self._pending.append(event)

    def drain(self) -> BlockEvents | None:
        """All that happened since the last call; None when nothing did."""
        if not self._pending:
            return None
        events = tuple(self._pending)
        self._pending.clear()
        return BlockEvents(first_number=self.last_number - len(events) + 1, events=events)
