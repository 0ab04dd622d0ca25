"""The `searoom` command: `up`, `down`, `status`, `chat`, `deploy`, `doctor`."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import time
from pathlib import Path
from typing import Annotated

import httpx
import typer
import yaml
from rich.console import Console

from serving import running
from serving.app import build
from serving.auth import load_key
from serving.chat import stream_answer
from serving.config import application_of, parse_config
from serving.deploy import deploy_application
from serving.errors import ConfigError, SearoomError
from serving.host import findings, read_host
from serving.status import print_status
from serving.up import KEY_VARIABLE, UpOptions, run_up
from serving.watch import watch

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
# A pipe has no width of its own, and `status` is a wide table.
console = Console(width=None if sys.stdout.isatty() else 140)

KeyOption = Annotated[
    str | None, typer.Option("--api-key", envvar=KEY_VARIABLE, help="Use this key, not the key file's.")
]


@app.command()
def up(
    model: Annotated[str, typer.Option(help="A folder, a .gguf file or a hub id.")] = "embedded",
    regions: Annotated[str | None, typer.Option(help="Pretend regions, e.g. us-east,eu-west.")] = None,
    home_region: Annotated[str | None, typer.Option(help="Where Ingress stands. Default: the first.")] = None,
    replicas_per_region: Annotated[int | None, typer.Option(min=1)] = None,
    tp: Annotated[int | None, typer.Option(min=1, help="Tensor-parallel ranks a replica.")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, bfloat16, int8, float32 or float16.")] = None,
    kv_blocks: Annotated[
        int | None, typer.Option(min=1, help="KV blocks a replica. Default: measured.")
    ] = None,
    tpot_ms: Annotated[
        float | None, typer.Option(min=1, help="Keep a stream's mean time a token within this.")
    ] = None,
    mock_engine: Annotated[
        bool, typer.Option("--mock-engine", help="Serve made-up tokens, without the model's weights.")
    ] = False,
    mock_step_ms: Annotated[
        float | None, typer.Option(min=0, help="With it: a step's least milliseconds. Default: 20.")
    ] = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="HTTP port of the endpoint.")] = 8000,
    dashboard_port: Annotated[int, typer.Option(min=1, max=65535)] = 8265,
    address: Annotated[str | None, typer.Option(help="Join this Ray cluster; do not start one.")] = None,
    cluster_file: Annotated[
        Path | None, typer.Option(help="Regions, fabrics and round trips (YAML).")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="A config file; flags go over it.")] = None,
    api_key: KeyOption = None,
) -> None:
    """Start a cluster on this machine, serve a model, and stay until Ctrl-C."""
    run_up(
        UpOptions(
            model=model if model != "embedded" else None,
            regions=tuple(name.strip() for name in regions.split(",")) if regions else None,
            home_region=home_region,
            replicas_per_region=replicas_per_region,
            tp=tp,
            dtype=dtype,
            kv_blocks=kv_blocks,
            tpot_ms=tpot_ms,
            mock_engine=mock_engine,
            mock_step_ms=mock_step_ms,
            port=port,
            dashboard_port=dashboard_port,
            address=address,
            cluster_file=cluster_file,
            config=config,
            api_key=api_key,
        ),
        console,
    )


@app.command()
def down() -> None:
    """Take down what `searoom up` runs on this machine."""
    cluster = running.require()
    os.kill(cluster.pid, signal.SIGTERM)
    with console.status("taking the cluster down"):
        deadline = time.monotonic() + 60
        while cluster.alive():
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"process {cluster.pid} has not ended within 60 s; end it with: kill {cluster.pid}"
                )
            time.sleep(0.1)
    console.print("down")


@app.command()
def status(
    api_key: KeyOption = None,
    live: Annotated[
        bool, typer.Option("--watch", help="Regions' room, queue and speed, each second until Ctrl-C.")
    ] = False,
) -> None:
    """Show regions, replicas, KV headroom, requests in flight, and the replicas needed."""
    cluster, key = _serving(), api_key or load_key()
    if live:
        watch(cluster.endpoint, key, cluster.alive, console)
    else:
        print_status(cluster.endpoint, key, console)


@app.command()
def chat(
    prompt: str,
    api_key: KeyOption = None,
    max_tokens: Annotated[int | None, typer.Option(min=1)] = None,
    temperature: Annotated[float | None, typer.Option(min=0, max=2)] = None,
    seed: Annotated[int | None, typer.Option()] = None,
) -> None:
    """Stream an answer in the terminal."""
    cluster = _serving()
    wanted = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}
    controls = {name: value for name, value in wanted.items() if value is not None}
    for piece in stream_answer(cluster.endpoint, api_key or load_key(), cluster.model, prompt, controls):
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")


@app.command()
def deploy(config: Path) -> None:
    """Deploy a Serve config of ours to the running Ray cluster; for use in `ray job submit`."""
    try:
        serve_config = yaml.safe_load(config.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{config}: cannot be read: {error}") from error
    if not isinstance(serve_config, dict):
        raise ConfigError(f"{config}: must hold a mapping of keys")
    application = application_of(serve_config, config)
    args = application.get("args") or {}
    parse_config(args, str(config))
    deploy_application(build(args), serve_config, application, console)


@app.command()
def doctor(
    engine: Annotated[
        bool, typer.Option("--engine", help="Also load the model: KV sizing, rates, decode speed.")
    ] = False,
    model: Annotated[str, typer.Option(help="A folder, a .gguf file or a hub id.")] = "embedded",
    dtype: Annotated[str, typer.Option(help="As in the config.")] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="Default: all cores.")] = None,
) -> None:
    """Say what this machine gives an engine, and what would make it faster."""
    if not engine:
        for finding in findings(read_host(), threads):
            console.print(str(finding), highlight=False, markup=False, soft_wrap=True)
        return
    # Torch comes with these, and would slow down every other command.
    setup = importlib.import_module("serving.bench.engine.offline").EngineSetup(
        source=model, dtype=dtype, threads=threads
    )
    importlib.import_module("serving.doctor").run(setup, console)


def _serving() -> running.Running:
    cluster = running.require()
    if not cluster.ready:
        raise ConfigError(f"the cluster (process {cluster.pid}) is still starting")
    return cluster


def main() -> None:
    """Entry point; every error of ours is one line on stderr and exit status 1."""
    try:
        app()
    except SearoomError as error:
        Console(stderr=True, soft_wrap=True).print(f"[bold red]error:[/] {error}", highlight=False)
        sys.exit(1)
    except httpx.ConnectError:
        Console(stderr=True).print("[bold red]error:[/] the endpoint does not answer; see: searoom status")
        sys.exit(1)
