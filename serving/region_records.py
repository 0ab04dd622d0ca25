"""How each region did lately: what ran there, and how soon its first tokens came. Pure."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from statistics import median

import msgspec

LATEST = 256  # answers whose time to first token counts


class RegionStatus(msgspec.Struct, frozen=True, kw_only=True):
    num_accepted: int
    ttft_p50_ms: float | None  # of the latest answers, as Ingress saw them
    is_home: bool  # where the Router stands: what runs elsewhere has spilled over


@dataclass(slots=True)
class _Record:
    num_accepted: int = 0
    ttft_ms: deque[float] = field(default_factory=lambda: deque(maxlen=LATEST))


class RegionRecords:
    def __init__(self, home: str) -> None:
        self._home = home
        self._records: dict[str, _Record] = {}

    def accepted(self, region: str) -> None:
        self._records.setdefault(region, _Record()).num_accepted += 1

    def first_token(self, region: str, ttft_ms: float) -> None:
        self._records.setdefault(region, _Record()).ttft_ms.append(ttft_ms)

    def status(self) -> dict[str, RegionStatus]:
        return {
            name: RegionStatus(
                num_accepted=record.num_accepted,
                ttft_p50_ms=median(record.ttft_ms) if record.ttft_ms else None,
                is_home=name == self._home,
            )
            for name, record in sorted(self._records.items())
        }
