"""When sessions start in an open loop: as a Poisson process, or as a trace says. Pure.

Only the first turn of a session arrives by itself; a later one follows the answer before it (Schroeder
et al., NSDI 2006, call this partly open). With R requests/s wished and m turns a session on average,
sessions therefore start at R / m a second.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace

from serving.bench.load.sessions import Session


def poisson(sessions: Iterator[Session], sessions_per_s: float, seed: int) -> Iterator[Session]:
    """The sessions with exponential gaps of mean `1 / sessions_per_s` seconds before each."""
    rng = random.Random(f"arrivals {seed}")
    now_s = 0.0
    for session in sessions:
        now_s += rng.expovariate(sessions_per_s)
        yield replace(session, start_s=now_s)


def sped_up(sessions: Iterator[Session], speed: float) -> Iterator[Session]:
    """The sessions in 1/speed of their time."""
    for session in sessions:
        yield replace(session, start_s=session.start_s / speed)
