"""`python -m serving.bench engine | gateway | load | router`: the engine beside its peers; what a request
costs on its way; an endpoint as its clients see it; the router's policy in simulated fleets.
"""

from __future__ import annotations

import typer

from serving.bench.engine.command import engine
from serving.bench.gateway.command import gateway
from serving.bench.load.command import load
from serving.bench.router.command import router

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)


@app.callback()
def programs() -> None:
    """Benchmarks of Searoom."""


app.command()(load)
app.command()(engine)
app.command()(router)
app.command()(gateway)
app()
