"""A run as it goes, on a terminal."""

from __future__ import annotations

import asyncio
from collections import Counter, deque

import numpy as np
from rich.console import Console
from rich.live import Live
from rich.text import Text

from serving.bench.load.run import Run

PERIOD_S = 0.5  # rarely, for drawing takes time that answers are not read in
_RATE_PERIODS = 6


class Progress:
    """Draws one line about a run, again and again until it is cancelled."""

    def __init__(self, run: Run, label: str) -> None:
        self._run = run
        self._label = label
        self._recent: deque[tuple[float, int]] = deque([(0.0, 0)], maxlen=_RATE_PERIODS + 1)

    async def show(self, console: Console) -> None:
        """Nothing is shown where there is no terminal."""
        if not console.is_terminal:
            return
        with Live(console=console, auto_refresh=False, transient=True) as live:
            while True:
                live.update(Text(self.line()), refresh=True)
                await asyncio.sleep(PERIOD_S)

    def line(self) -> str:
        """The run's state now; tokens/s is of the last few seconds."""
        run = self._run
        now_s = run.now_s()
        self._recent.append((now_s, run.num_pieces))
        then_s, before = self._recent[0]
        rate = (run.num_pieces - before) / max(now_s - then_s, 1e-3)
        states = Counter(record.state for record in run.records)
        ok = [record.ttft_ms for record in run.records if record.state == "ok"]
        parts = [
            f"{self._label}: {now_s:.0f} s",
            f"{len(run.records)} sent",
            f"{states['open']} in flight",
            f"{states['ok']} done",
            f"{states['refused']} refused",
            f"{states['failed']} failed",
            f"{rate:.0f} tokens/s",
        ]
        if ok:
            parts.append(f"TTFT p50 {np.median(ok):.0f} ms")
        return "  ".join(parts)
