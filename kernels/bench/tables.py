"""What was compiled and what was measured, as tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kernels.bench.measure import Ceilings, Measured
from kernels.bench.run import Broken
from kernels.gpu.compile import Compiled

_NONE = "-"


def print_compiled(compiled: Sequence[Compiled], console: Console) -> None:
    """A row for each variant and architecture, then what fails."""
    table = _table(
        "family", "variant", "for", "registers", "spilled B", "shared KiB", "warps", "occupancy",
        "instructions", text=(0, 1, 2, 8),
    )  # fmt: skip
    for one in compiled:
        counts = " ".join(f"{name} {count}" for name, count in one.instructions.items())
        table.add_row(
            one.family,
            escape(one.variant),
            one.architecture,
            str(one.registers),
            str(one.stack_bytes + one.local_bytes),
            f"{one.shared_bytes / 1024:.1f}",
            str(one.warps),
            f"{one.occupancy:.0%}",
            counts or _NONE,
        )
    console.print(table)
    failed = [one for one in compiled if one.failures]
    for one in failed:
        why = escape("; ".join(one.failures))
        console.print(f"[bold red]FAIL[/] {one.family}: {escape(one.variant)} for {one.architecture}: {why}")
    if not failed:
        families = len({one.family for one in compiled})
        console.print(f"[green]PASS[/] {len(compiled)} compilations of {families} families, none spills")


def print_ceilings(ceilings: Ceilings, console: Console) -> None:
    """What shares are of."""
    rates = ", ".join(f"{rate / 1e12:.0f} TFLOP/s {name}" for name, rate in ceilings.flops_per_s.items())
    console.print(f"{ceilings.device}; measured in this run: {ceilings.bytes_per_s / 1e9:.0f} GB/s, {rates}")


def print_family(
    family: str, found: Iterable[Measured | Broken], ceilings: Ceilings | None, console: Console
) -> None:
    """A row a case; without ceilings, of a rehearsal."""
    table = _table(family, "error", "", "µs", "rate", "of ceiling", "beside", text=(0, 2, 6))
    for one in found:
        if isinstance(one, Broken):
            table.add_row(
                escape(one.shape), _NONE, "[bold red]BROKE[/]", _NONE, _NONE, _NONE, escape(one.why)
            )
            continue
        word = "[green]right[/]" if one.right else "[bold red]WRONG[/]"
        table.add_row(
            escape(one.shape), f"{one.error:.1e}", word, *_speed(one, ceilings), escape(_beside(one))
        )
    console.print(table)


def share_of_ceiling(one: Measured | Broken, ceilings: Ceilings | None) -> float | None:
    """The least time that the machine could need, over the time it took."""
    if isinstance(one, Broken) or one.us is None or ceilings is None:
        return None
    if one.bound == "memory":
        least_s = one.moved_bytes / ceilings.bytes_per_s
    else:
        least_s = one.flops / ceilings.flops_per_s[one.bound]
    return least_s / (one.us * 1e-6)


def _speed(one: Measured, ceilings: Ceilings | None) -> tuple[str, str, str]:
    share = share_of_ceiling(one, ceilings)
    if one.us is None:
        return _NONE, _NONE, _NONE
    if one.bound == "memory":
        rate = f"{one.moved_bytes / one.us / 1e3:.0f} GB/s"
    else:
        rate = f"{one.flops / one.us / 1e6:.0f} TFLOP/s"
    return f"{one.us:.1f}", rate, _NONE if share is None else f"{share:.0%}"


def _beside(one: Measured) -> str:
    return "\n".join(f"{name}: {_peer(time, one.us)}" for name, time in one.peers.items()) or _NONE


def _peer(time: float | str | None, ours_us: float | None) -> str:
    if time is None or ours_us is None:
        return "runs"
    return time if isinstance(time, str) else f"{time:.1f} µs, {time / ours_us:.2f} × ours"


def _table(*columns: str, text: Sequence[int]) -> Table:
    table = Table(show_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index in text else "right", overflow="fold")
    return table
