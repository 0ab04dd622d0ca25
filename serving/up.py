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
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import ray
from ray import serve
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
from serving.ray_compat import start_application

HOST = "127.0.0.1"
KV_BYTES_PER_VALUE = 2


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
    port: int = 8000
    dashboard_port: int = 8265
    address: str | None = None
    cluster_file: Path | None = None
    config: Path | None = None
    api_key: str | None = None


def run_up(options: UpOptions, console: Console) -> None:
    """Bring everything up, say where it is, and stay until SIGINT or SIGTERM."""
    if (already := running.find()) is not None:
        raise ConfigError(
            f"a cluster is already running here (process {already.pid}, {already.endpoint}); "
            "take it down first with: searoom down"
        )
    _require_free_port(options.port, "--port")
    key = options.api_key or load_key()
    config = merge(options, digest_of(key))
    _fetch_model(config.model.source, console)
    plan = make_plan(config)
    _require_memory(plan)
    stop = _stop_event()
    with _ray_cluster(options, config, console) as (ray_address, dashboard):
        try:
            with _stage(console, "Serve", "starting Serve"):
                serve.start(proxy_location="HeadOnly", http_options=HTTPOptions(host=HOST, port=options.port))
            start_application(compose(plan), APPLICATION, "/")
            wait_until_running(console, stop)
            if stop.is_set():
                return
            endpoint = f"http://{HOST}:{options.port}"
            with _stage(console, "endpoint", "waiting for the endpoint"):
                _wait_ready(endpoint, stop)
            running.save(
                running.Running.here(
                    endpoint=endpoint, dashboard=dashboard, model=plan.model_name, ray_address=ray_address
                )
            )
            _print_how_to_use(console, endpoint, dashboard, plan.model_name, key)
            stop.wait()
        finally:
            running.forget()
            console.print("taking it down ...")
            if options.address is not None:  # a cluster of our own goes as a whole
                serve.delete(APPLICATION, _blocking=False)


def merge(options: UpOptions, key_digest: str) -> SearoomConfig:
    """The config file, if any, with the flags over it."""
    base = read_config(options.config) if options.config else SearoomConfig()
    args: dict[str, Any] = base.model_dump(mode="json", exclude_unset=True)
    _set(args, "model", source=options.model, dtype=options.dtype)
    _set(args, "engine", tensor_parallel=options.tp, kv_blocks=options.kv_blocks)
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


@contextmanager
def _ray_cluster(options: UpOptions, config: SearoomConfig, console: Console) -> Iterator[tuple[str, str]]:
    """(Ray address, dashboard URL): joined with --address, else started here and ended at exit."""
    if options.address is not None:
        with _stage(console, "Ray", f"joining {options.address}"):
            try:
                context = _join(options.address)
            except (ConnectionError, RuntimeError) as error:
                raise ConfigError(
                    f"--address: no Ray cluster answers at {options.address}: {error}"
                ) from error
        try:
            yield options.address, f"http://{context.dashboard_url}"
        finally:
            ray.shutdown()
        return
    _require_free_port(options.dashboard_port, "--dashboard-port")
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
        yield cluster.address, cluster.dashboard_url
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
    """A plain bind: Serve's proxy sets SO_REUSEPORT, and would silently share a port in use."""
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
    if engine.kv_blocks is None or engine.device != "cpu":
        return
    replicas = sum(region.replicas for region in plan.config.regions)
    bytes_per_block = plan.spec.kv_bytes_per_token(KV_BYTES_PER_VALUE) * engine.block_tokens
    needed = engine.kv_blocks * bytes_per_block * replicas
    free = psutil.virtual_memory().available
    if needed > free:
        raise ConfigError(
            f"--kv-blocks: {engine.kv_blocks} blocks in each of {replicas} replicas need {needed >> 20} MiB, "
            f"and {free >> 20} MiB are free; at most {free // (bytes_per_block * replicas)} would fit"
        )


def _stop_event() -> threading.Event:
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    return stop


def _wait_ready(endpoint: str, stop: threading.Event) -> None:
    while not stop.is_set():
        try:
            if httpx.get(f"{endpoint}/ready", timeout=5.0).status_code == 200:
                return
        except httpx.TransportError:
            pass  # the proxy is still learning its routes
        stop.wait(0.1)


@contextmanager
def _stage(console: Console, name: str, doing: str) -> Iterator[None]:
    started = time.monotonic()
    with console.status(doing):
        yield
    _done(console, name, "", started)


def _done(console: Console, name: str, what: str, started: float) -> None:
    console.print(f"[green]✓[/] {name:<10} {what:<40} {time.monotonic() - started:5.1f} s", highlight=False)


def _print_how_to_use(console: Console, endpoint: str, dashboard: str, model: str, key: str) -> None:
    messages = '[{"role": "user", "content": "What is the capital of France?"}]'
    body = f'{{"model": "{model}", "messages": {messages}}}'
    lines = f"""
endpoint   {endpoint}/v1
API key    {key}
dashboard  {dashboard}

curl {endpoint}/v1/chat/completions -H "Authorization: Bearer {key}" \\
  -H "Content-Type: application/json" -d '{body}'

from openai import OpenAI
client = OpenAI(base_url="{endpoint}/v1", api_key="{key}")
reply = client.chat.completions.create(model="{model}", messages={messages})
print(reply.choices[0].message.content)

Ctrl-C takes it down."""
    console.print(lines, highlight=False, markup=False, soft_wrap=True)
