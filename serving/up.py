"""`searoom up`: a cluster on this machine from nothing to its first answer, and back to nothing.

Each stage prints one line when it is done. Everything that can be known to be impossible is said
before anything starts.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import httpx
import psutil
import ray
from ray import serve
from ray.exceptions import RaySystemError
from ray.serve.config import HTTPOptions
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from cluster.local import ClusterStartError, LocalCluster, NodeSpec
from cluster.placement import REGION_LABEL
from serving import model_files, running
from serving.app import Plan, compose, make_plan
from serving.auth import digest_of, load_key
from serving.config import SearoomConfig, parse_config, read_config
from serving.deploy import APPLICATION, quiet_serve, wait_until_running
from serving.errors import ConfigError
from serving.ray_compat import running_http_port, start_application

HOST = "127.0.0.1"
KEY_VARIABLE = "SEAROOM_API_KEY"
READY_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class UpOptions:
    """The flags of `searoom up`; None is "not given"."""

    model: str | None = None
    regions: tuple[str, ...] | None = None
    home_region: str | None = None
    replicas_per_region: int | None = None
    tp: int | None = None
    dtype: str | None = None
    kv_blocks: int | None = None
    tpot_ms: float | None = None
    mock_engine: bool = False
    mock_step_ms: float | None = None
    port: int = 8000
    dashboard_port: int = 8265
    address: str | None = None
    cluster_file: Path | None = None
    config: Path | None = None
    api_key: str | None = None


def run_up(options: UpOptions, console: Console) -> None:
    """Bring everything up, say where it is, and stay until SIGINT or SIGTERM."""
    key = options.api_key or load_key()
    with suppress(KeyboardInterrupt), brought_up(options, key, console) as facts:
        _print_how_to_use(console, facts, key)
        try:
            threading.Event().wait()
        finally:
            console.print("taking it down ...")


@contextmanager
def brought_up(options: UpOptions, key: str, console: Console) -> Iterator[running.Running]:
    """What `searoom up` brings up, which serves and takes `key`; this process has joined its Ray cluster.

    SIGINT and SIGTERM become KeyboardInterrupt; afterwards nothing is left. Raises ConfigError.
    """
    if (already := running.find()) is not None:
        raise ConfigError(
            f"a cluster is already running here (process {already.pid}, {already.endpoint}); "
            "take it down first with: searoom down"
        )
    if options.address is None:
        _require_free_port(options.port, "--port")
        _require_free_port(options.dashboard_port, "--dashboard-port")
    os.environ.pop(KEY_VARIABLE, None)  # or every process of Ray would inherit the key
    config = merge(options, digest_of(key))
    _fetch_model(config.model.source, console)
    if config.engine.mock is not None:
        console.print("  mock engine: no model runs, answers are made-up words")
    plan = make_plan(config)
    _require_memory(plan)
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell's `&` would leave SIGINT ignored
        signal.signal(number, _interrupt)  # whatever is under way is left, and undone
    with ExitStack() as undo:
        undo.callback(console.print, "down")
        cluster = undo.enter_context(_ray_cluster(options, config, console))
        facts = running.Running.here(
            endpoint=f"http://{HOST}:{_start_serve(options, console)}",
            dashboard=cluster.dashboard,
            model=plan.model_name,
            ray_address=cluster.address,
        )
        running.save(facts)
        undo.callback(running.forget)
        if options.address is not None:  # a cluster of our own goes as a whole
            undo.callback(serve.delete, APPLICATION, _blocking=False)
        start_application(compose(plan), APPLICATION, "/")
        wait_until_running(console)
        with _stage(console, "endpoint", "waiting for the endpoint"):
            _wait_ready(facts.endpoint)
        facts = replace(facts, ready=True)
        running.save(facts)
        yield facts


def merge(options: UpOptions, key_digest: str) -> SearoomConfig:
    """The config file, if any, with the flags over it."""
    base = read_config(options.config) if options.config else SearoomConfig()
    args: dict[str, Any] = base.model_dump(mode="json", exclude_unset=True)
    _set(args, "model", source=options.model, dtype=options.dtype)
    _set(args, "engine", tensor_parallel=options.tp, kv_blocks=options.kv_blocks, tpot_ms=options.tpot_ms)
    if options.mock_engine:
        _set(args, "engine", mock=args.get("engine", {}).get("mock") or {})
    if options.mock_step_ms is not None:
        mock = args.get("engine", {}).get("mock")
        if mock is None:
            raise ConfigError("--mock-step-ms: is of the mock engine; give --mock-engine too")
        _set(args, "engine", mock={**mock, "base_ms": options.mock_step_ms})
    _set(args, "ingress", auth={"key_sha256": [key_digest]})
    replicas = options.replicas_per_region
    if options.regions:
        args["regions"] = [{"name": name, "replicas": replicas or 1} for name in options.regions]
        args["pin_regions"] = True
        _set(args, "routing", pretend_rtt=True)
    elif replicas:
        args["regions"] = [region.model_dump() | {"replicas": replicas} for region in base.regions]
    if options.home_region:
        args["home_region"] = options.home_region
    if options.cluster_file:
        args["cluster_file"] = str(options.cluster_file)
    config = parse_config(args, str(options.config or "searoom up"))
    if options.address is None:
        _set(args, "ingress", host=HOST, port=options.port)
        config = parse_config(args, "searoom up")
    if config.engine.threads is None and options.address is None:
        # Every rank of every pretend region shares this machine's cores.
        ranks = config.engine.tensor_parallel * sum(region.replicas for region in config.regions)
        _set(args, "engine", threads=max(1, (os.cpu_count() or 1) // ranks))
        config = parse_config(args, "searoom up")
    return config


def _set(args: dict[str, Any], section: str, **values: Any) -> None:
    given = {key: value for key, value in values.items() if value is not None}
    if given:
        args[section] = {**args.get(section, {}), **given}


@dataclass(frozen=True)
class Joined:
    """The Ray cluster this process is part of."""

    address: str
    dashboard: str


@contextmanager
def _ray_cluster(options: UpOptions, config: SearoomConfig, console: Console) -> Iterator[Joined]:
    """Joined with --address, else started here and ended at exit."""
    if options.address is not None:
        with _stage(console, "Ray", f"joining {options.address}"):
            try:
                context = _join(options.address)
            except (ConnectionError, RuntimeError, RaySystemError) as error:
                raise ConfigError(
                    f"--address: no Ray cluster answers at {options.address}: {error}"
                ) from error
        try:
            yield Joined(options.address, f"http://{context.dashboard_url}")
        finally:
            ray.shutdown()
        return
    labels = [{REGION_LABEL: region.name} if config.pin_regions else {} for region in config.regions]
    home = [region.name for region in config.regions].index(config.home)
    labels.insert(0, labels.pop(home))  # the head node, and with it the HTTP proxy, stands at home
    cluster = LocalCluster(
        [NodeSpec(labels=label) for label in labels], dashboard_port=options.dashboard_port
    )
    try:
        with _stage(console, "Ray", f"starting Ray ({len(labels)} node{'s' * (len(labels) > 1)})"):
            cluster.start()
            _join(cluster.address)
        yield Joined(cluster.address, cluster.dashboard_url)
    except ClusterStartError as error:
        raise ConfigError(str(error)) from error
    finally:
        ray.shutdown()
        cluster.stop()


def _join(address: str) -> Any:
    quiet_serve()
    return ray.init(address=address, namespace="searoom", log_to_driver=False, logging_level=logging.WARNING)


def _fetch_model(source: str, console: Console) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("model", total=None)

        def progress(done_bytes: int, total_bytes: int | None, what: str) -> None:
            bar.update(task, completed=done_bytes, total=total_bytes, description=what)

        started = time.monotonic()
        files = model_files.resolve(source, progress=progress)
    _done(console, "model", f"{files.name}", started)


def _require_free_port(port: int, flag: str) -> None:
    """A plain bind: Ingress and Serve's proxy set SO_REUSEPORT, and would silently share a port in use."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # closed connections do not use it
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise ConfigError(
                f"{flag}: port {port} on {HOST} is in use; choose another with {flag}"
            ) from error


def _require_memory(plan: Plan) -> None:
    """An explicit KV pool must fit this machine, weights besides."""
    engine = plan.config.engine
    if engine.kv_blocks is None or engine.device != "cpu" or engine.mock is not None:
        return
    replicas = sum(region.replicas for region in plan.config.regions)
    value_bytes = 4 if plan.config.dtype == "float32" else 2
    bytes_per_block = plan.spec.kv_bytes_per_token(value_bytes) * engine.block_tokens
    needed = engine.kv_blocks * bytes_per_block * replicas
    free = psutil.virtual_memory().available
    if needed > free:
        raise ConfigError(
            f"--kv-blocks: {engine.kv_blocks} blocks in each of {replicas} replicas need {needed >> 20} MiB, "
            f"and {free >> 20} MiB are free; at most {free // (bytes_per_block * replicas)} would fit"
        )


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _start_serve(options: UpOptions, console: Console) -> int:
    """Start Serve, or find it running on the joined cluster; returns its HTTP port."""
    with _stage(console, "Serve", "starting Serve"):
        if options.address is not None:
            port = running_http_port()
            if APPLICATION in (serve.status().applications if port is not None else ()):
                raise ConfigError(
                    f"--address: the cluster runs an application {APPLICATION!r} already; "
                    f"remove it first, or deploy over it with: python -m serving deploy"
                )
            if port is not None:
                return port
        if options.address is None:  # Ingress answers HTTP itself
            serve.start(proxy_location="Disabled")
        else:
            serve.start(proxy_location="HeadOnly", http_options=HTTPOptions(host=HOST, port=options.port))
        return options.port


def _wait_ready(endpoint: str) -> None:
    deadline = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline:
        with suppress(httpx.TransportError):  # the proxy is still learning its routes
            if httpx.get(f"{endpoint}/ready", timeout=5.0).status_code == 200:
                return
        time.sleep(0.1)
    raise ConfigError(f"{endpoint}/ready did not answer within {READY_TIMEOUT_S:.0f} s; see Ray's logs")


@contextmanager
def _stage(console: Console, name: str, doing: str) -> Iterator[None]:
    started = time.monotonic()
    with console.status(doing):
        yield
    _done(console, name, "", started)


def _done(console: Console, name: str, what: str, started: float) -> None:
    console.print(f"[green]✓[/] {name:<10} {what:<40} {time.monotonic() - started:5.1f} s", highlight=False)


def _print_how_to_use(console: Console, facts: running.Running, key: str) -> None:
    endpoint, model = facts.endpoint, facts.model
    messages = '[{"role": "user", "content": "What is the capital of France?"}]'
    body = f'{{"model": "{model}", "messages": {messages}}}'
    lines = f"""
endpoint   {endpoint}/v1
API key    {key}
dashboard  {facts.dashboard}

curl {endpoint}/v1/chat/completions -H "Authorization: Bearer {key}" \\
  -H "Content-Type: application/json" -d '{body}'

from openai import OpenAI
client = OpenAI(base_url="{endpoint}/v1", api_key="{key}")
reply = client.chat.completions.create(model="{model}", messages={messages})
print(reply.choices[0].message.content)

Ctrl-C takes it down."""
    console.print(lines, highlight=False, markup=False, soft_wrap=True)
