"""`python -m serving.bench engine | gateway | load | router | collectives`: the engine beside its peers; what
a request costs on its way; an endpoint as its clients see it; the router's policy in simulated fleets; what
a fabric gives to tensor parallelism.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import typer
from typer.core import TyperGroup

from serving.bench.commands import errors_told
from serving.errors import ConfigError

PROGRAMS = ("load", "engine", "router", "gateway", "collectives")


class Programs(TyperGroup):
    """Each program is the function of its name in `serving.bench.NAME.command`.

    It is imported when it is asked for, and so needs no more than it uses: the engine's no Ray.
    """

    def list_commands(self, ctx: Any) -> list[str]:
        return list(PROGRAMS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in PROGRAMS:
            return None
        only = typer.Typer(add_completion=False)
        only.command(name=cmd_name)(program(cmd_name))
        return typer.main.get_command(only)


def program(name: str) -> Callable[..., None]:
    """The program's function; where a library of its is not installed, one that says so."""
    try:
        module = importlib.import_module(f"serving.bench.{name}.command")
    except ModuleNotFoundError as missing:
        library = missing.name

        def refuse() -> None:
            with errors_told():
                raise ConfigError(f"{name} needs {library}, which is not installed")

        refuse.__doc__ = f"Not here: needs {library}."
        return refuse
    function: Callable[..., None] = getattr(module, name)
    return function


app = typer.Typer(cls=Programs, add_completion=False, no_args_is_help=True, help=__doc__)


@app.callback()
def programs() -> None:
    """Benchmarks of Searoom."""


if __name__ == "__main__":
    app()
