"""`searoom status`: regions, replicas, headroom, and how many replicas the load needs."""

from __future__ import annotations

import httpx
import msgspec
from rich.console import Console
from rich.table import Table

from autoscaler.signals import Demand, replicas_needed
from serving.dispatcher import RouterStatus
from serving.errors import SearoomError
from serving.fleet import ReplicaStatus

COLUMNS = (
    "region", "replica", "state", "rtt ms", "in flight", "running", "waiting",
    "blocks", "used", "cached", "reserved", "headroom",
)  # fmt: skip


def fetch_status(endpoint: str, key: str) -> RouterStatus:
    """What the Router tells now. Raises SearoomError with the server's words, or httpx.TransportError."""
    response = httpx.get(f"{endpoint}/status", headers={"Authorization": f"Bearer {key}"}, timeout=10.0)
    if response.status_code != 200:
        raise SearoomError(_message(response))
    return msgspec.json.decode(response.content, type=RouterStatus)


def print_status(endpoint: str, key: str, console: Console) -> None:
    status = fetch_status(endpoint, key)
    waiting = sum(status.waiting.values())
    console.print(f"{endpoint}: {waiting} requests wait for headroom", highlight=False)
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in COLUMNS:
        table.add_column(name, justify="left" if name in COLUMNS[:3] else "right", no_wrap=True)
    for replica in status.replicas:
        table.add_row(*_row(replica))
    for replica_id in status.unreported:
        table.add_row("", replica_id, "not heard of yet")
    console.print(table)
    _print_needed(status, console)


def _row(replica: ReplicaStatus) -> tuple[str, ...]:
    load = replica.load
    used = load.blocks_total - load.blocks_free - load.blocks_evictable
    figures = (
        round(replica.rtt_ms),
        replica.num_in_flight,
        load.num_running,
        load.num_waiting,
        load.blocks_total,
        used,
        load.blocks_evictable,
        load.blocks_reserved,
        load.room_blocks - replica.dispatched_blocks,
    )
    state = f"{replica.state}, asleep" if load.asleep else replica.state
    return (load.region, load.replica_id, state, *map(str, figures))


def _print_needed(status: RouterStatus, console: Console) -> None:
    """What the autoscaler's signals say; nothing acts on it yet."""
    loads = [replica.load for replica in status.replicas]
    for region in sorted({load.region for load in loads}):
        here = tuple(load for load in loads if load.region == region)
        needed = replicas_needed(Demand(loads=here))
        console.print(f"{region}: {len(here)} replicas, {needed.n} needed: {needed.why}", highlight=False)


def _message(response: httpx.Response) -> str:
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, TypeError, KeyError):  # not from Searoom: Serve itself, while the application starts
        return f"the server answered {response.status_code} {response.reason_phrase}"
