"""`searoom status --watch`: every region's room, queue and speed, again each second."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime

import httpx
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from serving.dispatcher import RouterStatus
from serving.errors import SearoomError
from serving.fleet import ReplicaStatus
from serving.region_records import RegionStatus
from serving.status import fetch_status

PERIOD_S = 1.0


@dataclass(frozen=True)
class RegionView:
    """What the Router tells of one region."""

    name: str
    replicas: tuple[ReplicaStatus, ...]
    record: RegionStatus | None  # None: nothing ran there yet

    @property
    def headroom_blocks(self) -> int:
        """Over its replicas; negative where more is promised than there is."""
        return sum(replica.load.room_blocks - replica.dispatched_blocks for replica in self.replicas)

    @property
    def kv_utilisation(self) -> float:
        """The share of blocks that somebody reads: cached blocks without a reader are room."""
        total = sum(replica.load.blocks_total for replica in self.replicas)
        idle = sum(replica.load.blocks_free + replica.load.blocks_evictable for replica in self.replicas)
        return (total - idle) / total if total else 0.0

    @property
    def num_spilled(self) -> int:
        """Requests that ran here because they found no better place at home."""
        return 0 if self.record is None or self.record.is_home else self.record.num_accepted

    @property
    def ttft(self) -> str:
        ttft_ms = self.record.ttft_p50_ms if self.record else None
        return "-" if ttft_ms is None else f"{ttft_ms:.0f}"

    @property
    def num_fresh(self) -> int:
        return sum(replica.state == "fresh" for replica in self.replicas)


COLUMNS: tuple[tuple[str, Callable[[RegionView], str]], ...] = (
    ("region", lambda region: region.name),
    ("replicas", lambda region: _of(region.num_fresh, len(region.replicas))),
    ("rtt ms", lambda region: f"{min(replica.rtt_ms for replica in region.replicas):.0f}"),
    ("headroom", lambda region: str(region.headroom_blocks)),
    ("KV used %", lambda region: f"{100 * region.kv_utilisation:.0f}"),
    ("running", lambda region: str(sum(replica.load.num_running for replica in region.replicas))),
    ("waiting", lambda region: str(sum(replica.load.num_waiting for replica in region.replicas))),
    ("in flight", lambda region: str(sum(replica.num_in_flight for replica in region.replicas))),
    (
        "prefill tokens",
        lambda region: str(sum(replica.load.prefill_backlog_tokens for replica in region.replicas)),
    ),
    ("accepted", lambda region: str(region.record.num_accepted if region.record else 0)),
    ("spilled", lambda region: str(region.num_spilled)),
    ("TTFT p50 ms", lambda region: region.ttft),
)
"""A column is its heading and how a region's cell is made; `headroom` is in blocks."""


def regions_of(status: RouterStatus) -> list[RegionView]:
    """The regions with replicas that have reported, by name."""
    names = sorted({replica.load.region for replica in status.replicas})
    return [
        RegionView(
            name,
            tuple(replica for replica in status.replicas if replica.load.region == name),
            status.regions.get(name),
        )
        for name in names
    ]


def picture(status: RouterStatus) -> Group:
    """A table of regions, and what waits in the Router."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name, _ in COLUMNS:
        table.add_column(name, justify="left" if name == "region" else "right", no_wrap=True)
    for region in regions_of(status):
        table.add_row(*(cell(region) for _, cell in COLUMNS))
    lines = [f"{model}: {number} requests queue in the Router" for model, number in status.waiting.items()]
    lines += [f"{replica_id}: not heard of yet" for replica_id in status.unreported]
    return Group(table, *(Text(line) for line in lines or ["no request queues in the Router"]))


def watch(endpoint: str, key: str, is_alive: Callable[[], bool], console: Console) -> None:
    """Show `picture` each second until Ctrl-C, or until the cluster is down.

    Where there is no terminal each one is printed. Raises as `fetch_status` does, if that fails at once.
    """
    shown = picture(fetch_status(endpoint, key))
    with suppress(KeyboardInterrupt), Live(console=console, auto_refresh=False) as live:
        while is_alive():
            now = Text(f"{endpoint}  {datetime.now():%H:%M:%S}  Ctrl-C ends", style="dim")
            _show(Group(now, shown), live, console)
            time.sleep(PERIOD_S)
            try:
                shown = picture(fetch_status(endpoint, key))
            except (httpx.TransportError, SearoomError) as error:
                shown = Group(Text(f"no status: {error or type(error).__name__}", style="red"))
        console.print("the cluster is down")


def _show(frame: Group, live: Live, console: Console) -> None:
    if console.is_terminal:
        live.update(frame, refresh=True)
    else:
        console.print(frame)


def _of(part: int, whole: int) -> str:
    return str(whole) if part == whole else f"{part} of {whole}"
