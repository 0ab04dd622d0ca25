"""What the benchmarks' commands share: errors in one line, and what is found before anything is measured."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from serving.errors import ConfigError, SearoomError

Plotter = Callable[[Any, Path], None]
"""Writes a report of its own kind as a PNG."""


@contextmanager
def errors_told() -> Iterator[None]:
    """An error that was foreseen is a line on stderr and the end of the command."""
    try:
        yield
    except SearoomError as error:
        errors = Console(stderr=True, soft_wrap=True)
        errors.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False)
        raise typer.Exit(1) from error


def check_folder(flag: str, path: Path | None) -> None:
    """So that a slip costs no run. Raises ConfigError."""
    if path is not None and not path.parent.is_dir():
        raise ConfigError(f"{flag} {path}: there is no folder {path.parent}")


def plotter(module: str) -> Plotter:
    """`write_plot` of this module. Raises ConfigError where a library is missing."""
    try:
        write: Plotter = importlib.import_module(module).write_plot
    except ModuleNotFoundError as missing:
        raise ConfigError(
            f"--plot: {missing.name} is not installed: pip install 'searoom[bench]'"
        ) from missing
    return write


def progress_bar(console: Console) -> Progress:
    """What is done, of how much, and since when; gone when it is over."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True)
