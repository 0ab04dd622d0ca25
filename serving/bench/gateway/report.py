"""What was found, as JSON and as tables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

from serving.bench.gateway.hop import Hop
from serving.bench.gateway.processes import INGRESS, ROLES, ROUTER
from serving.bench.gateway.throughput import Throughput

TARGET_REQUESTS_PER_CPU_S = 800.0
TARGET_HOP_MS = 1.0


class Report(msgspec.Struct, frozen=True):
    date: str
    command: str
    cores: int
    throughput: Throughput
    hops: tuple[Hop, ...]


def write_json(report: Report, path: Path) -> None:
    path.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2))


def print_report(report: Report, console: Console) -> None:
    _print_throughput(report.throughput, console)
    _print_hops(report.hops, console)


def _print_throughput(found: Throughput, console: Console) -> None:
    table = Table(title=f"{found.streams} streams of {found.max_tokens} tokens, {found.window_s:.0f} s")
    table.add_column("processes")
    table.add_column("CPU ms a request", justify="right")
    table.add_column("CPU busy", justify="right")
    for role, cost_ms in found.cpu_ms_a_request().items():
        table.add_row(role, f"{cost_ms:.2f}", f"{100 * found.cpu_s[role] / found.window_s:.0f} %")
    both_s = found.cpu_s[INGRESS] + found.cpu_s[ROUTER]
    table.add_section()
    table.add_row(
        f"{INGRESS} and {ROUTER}",
        f"{1000 * both_s / found.requests:.2f}",
        f"{100 * both_s / found.window_s:.0f} %",
    )
    all_s = sum(found.cpu_s[role] for role in ROLES)
    table.add_row(
        "all but clients", f"{1000 * all_s / found.requests:.2f}", f"{100 * all_s / found.window_s:.0f} %"
    )
    console.print(table)
    rate = found.requests_per_cpu_s
    console.print(
        f"{rate:.0f} requests a CPU-second of {INGRESS} and {ROUTER} together "
        f"(target {TARGET_REQUESTS_PER_CPU_S:.0f}, {_verdict(rate >= TARGET_REQUESTS_PER_CPU_S)}); "
        f"{found.requests_per_s:.0f} requests/s",
        highlight=False,
    )
    if found.ttft_ms is not None:
        console.print(f"TTFT p50 {found.ttft_ms.p50:.0f} ms, p99 {found.ttft_ms.p99:.0f} ms", highlight=False)


def _print_hops(hops: Sequence[Hop], console: Console) -> None:
    table = Table(title="The Router's hop beside a bare unary call of Serve")
    for column in ("at once", "pick p50 ms", "p99", "bare p50 ms", "p99", "pick over bare", "target"):
        table.add_column(column, justify="right")
    for hop in hops:
        table.add_row(
            str(hop.concurrency),
            f"{hop.pick_ms.p50:.2f}",
            f"{hop.pick_ms.p99:.2f}",
            f"{hop.bare_ms.p50:.2f}",
            f"{hop.bare_ms.p99:.2f}",
            f"{hop.added_ms:+.2f} ms",
            f"{TARGET_HOP_MS:+.0f} ms: {_verdict(hop.added_ms <= TARGET_HOP_MS)}",
        )
    console.print(table)


def _verdict(is_met: bool) -> str:
    return "pass" if is_met else "missed"
