"""`python -m kernels.bench`: every kernel's error and speed on this machine's GPU, beside the best library.

Without a GPU: `--compile` compiles all that ships for every architecture and checks registers, shared memory
and instructions; `--rehearse` runs every case, tiny, in Triton's interpreter.
"""

from __future__ import annotations

import itertools
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import track

from kernels.bench import run
from kernels.bench.measure import Ceilings, Measured
from kernels.bench.tables import print_ceilings, print_compiled, print_family, share_of_ceiling
from kernels.bench.worker import FAMILIES
from kernels.gpu import compile as ahead

_WIDTH = 160  # of tables that go to a file
_NO_GPU = (
    "there is no CUDA GPU here; `--compile` compiles every kernel without one, and `--rehearse` runs every "
    "case in the interpreter"
)


def bench(
    compile_only: Annotated[
        bool, typer.Option("--compile", help="Instead: compile everything ahead of time, and check it.")
    ] = False,
    rehearse: Annotated[
        bool, typer.Option("--rehearse", help="Instead: every case, tiny, in the interpreter.")
    ] = False,
    only: Annotated[list[str] | None, typer.Option(help="These families; default: all.")] = None,
    capability: Annotated[
        list[int] | None, typer.Option(help="With --compile, for these: 80, 90, 100. Default: all.")
    ] = None,
    one_each: Annotated[
        bool, typer.Option("--one-each", help="With --compile: one variant of each kernel.")
    ] = False,
    processes: Annotated[int, typer.Option(min=1, help="With --compile, at once.")] = 2,
    json_file: Annotated[
        Path | None, typer.Option("--json", dir_okay=False, help="Write every figure there.")
    ] = None,
) -> None:
    """Every kernel beside the best library on this GPU; or, without one, --compile and --rehearse."""
    console = Console() if Console().is_terminal else Console(width=_WIDTH)
    if compile_only:
        # Before the kernels are imported: were they imported for the interpreter, there were no code.
        os.environ.pop("TRITON_INTERPRET", None)
        wanted = ahead.tasks(only or [], capability or [], one_each=one_each)
        passed = _compile(wanted, processes, json_file, console)
    elif rehearse or torch.cuda.is_available():
        passed = _measure(only or list(FAMILIES), rehearse, json_file, console)
    else:
        Console(stderr=True, soft_wrap=True).print(_NO_GPU)
        passed = False
    if not passed:
        raise typer.Exit(1)


def _compile(wanted: list[ahead.Task], processes: int, json_file: Path | None, console: Console) -> bool:
    results = ahead.compile_all(wanted, processes)
    errors = Console(stderr=True)
    compiled = list(track(results, "compiling", len(wanted), console=errors, transient=True))
    print_compiled(compiled, console)
    _write(json_file, {"compiled": [asdict(one) for one in compiled]})
    return not any(one.failures for one in compiled)


def _measure(families: list[str], tiny: bool, json_file: Path | None, console: Console) -> bool:
    if unknown := set(families) - FAMILIES.keys():
        raise typer.BadParameter(
            f"no such family: {', '.join(sorted(unknown))}; there are {', '.join(FAMILIES)}"
        )
    ceilings = None if tiny else _ceilings(console)
    report: dict[str, Any] = {
        **run.provenance(),
        "rehearsed": tiny,
        "ceilings": asdict(ceilings) if ceilings else None,
        "cases": [],
    }
    found: list[Measured | run.Broken] = []
    # A process each, so that none breaks another; a rehearsal breaks nothing and starts faster as one.
    for group in [families] if tiny else [[family] for family in families]:
        before = len(found)
        for one in run.measure_families(group, tiny=tiny):
            found.append(one)
            report["cases"].append({**asdict(one), "share": share_of_ceiling(one, ceilings)})
            _write(json_file, report)  # after every case: a run that is cut short keeps what it has
        for family, results in itertools.groupby(found[before:], key=lambda one: one.family):
            print_family(family, results, ceilings, console)
    return all(isinstance(one, Measured) and one.right for one in found)


def _ceilings(console: Console) -> Ceilings | None:
    try:
        ceilings = run.measure_ceilings()
    except ChildProcessError as error:  # times are worth having without shares, too
        console.print(f"[bold red]no ceilings[/]: {escape(str(error))}")
        return None
    print_ceilings(ceilings, console)
    return ceilings


def _write(json_file: Path | None, report: dict[str, Any]) -> None:
    if json_file is not None:
        json_file.write_text(json.dumps(report, indent=1) + "\n")


typer.run(bench)
