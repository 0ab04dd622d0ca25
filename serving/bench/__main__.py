"""`python -m serving.bench engine | load`: the engine beside its peers; an endpoint as its clients see it."""

from __future__ import annotations

import asyncio
from typing import Annotated

import httpx
import typer
from rich.console import Console

from serving import running
from serving.auth import load_key
from serving.bench.engine.command import engine
from serving.bench.load import LoadPlan, print_results, run_load

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)


@app.callback()
def programs() -> None:
    """Benchmarks of Searoom."""


@app.command()
def load(
    endpoint: Annotated[str | None, typer.Option(help="Default: what `searoom up` runs here.")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="SEAROOM_API_KEY")] = None,
    model: Annotated[str | None, typer.Option(help="Default: the first the endpoint lists.")] = None,
    streams: Annotated[str, typer.Option(help="Concurrent streams, one run each, e.g. 1,8,32.")] = "1,32",
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens a stream; the end of text is ignored.")] = 64,
) -> None:
    """Streams of equal length at several concurrencies: tokens/s, TTFT and time per token."""
    plan = LoadPlan(
        endpoint=endpoint or running.require().endpoint,
        api_key=api_key or load_key(),
        model=model,
        max_tokens=max_tokens,
    )
    console = Console()
    results = []
    for number in (int(part) for part in streams.split(",")):
        with console.status(f"{number} streams of {max_tokens} tokens"):
            try:
                results.append(asyncio.run(run_load(plan, number)))
            except httpx.HTTPError as error:
                console.print(f"[bold red]error:[/] {plan.endpoint}: {error}")
                raise typer.Exit(1) from error
    print_results(results, console)


app.command()(engine)
app()
