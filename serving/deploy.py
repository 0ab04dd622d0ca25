"""Deploying the application to a Ray cluster, and waiting for it with a live line a stage."""

from __future__ import annotations

import logging
import time
from typing import Any

import ray
from ray import serve
from ray.serve import Application
from ray.serve.config import HTTPOptions
from ray.serve.schema import ApplicationStatus, DeploymentStatus
from rich.console import Console

from serving.errors import ConfigError
from serving.ray_compat import start_application

APPLICATION = "searoom"
POLL_S = 0.2


def deploy_application(
    application: Application, serve_config: dict[str, Any], entry: dict[str, Any], console: Console
) -> None:
    """Run a Serve config's one application on the cluster this process belongs to.

    Meant for `ray job submit`: replicas use the job's working directory, so nothing is installed.
    """
    ray.init(namespace="searoom", log_to_driver=False)
    quiet_serve()
    options = serve_config.get("http_options") or {}
    serve.start(
        proxy_location=serve_config.get("proxy_location", "HeadOnly"),
        http_options=HTTPOptions(host=options.get("host", "127.0.0.1"), port=options.get("port", 8000)),
    )
    name = entry.get("name", APPLICATION)
    start_application(application, name, entry.get("route_prefix", "/"))
    wait_until_running(console, name)


def quiet_serve() -> None:
    """Serve's own progress lines would run through ours."""
    logging.getLogger("ray.serve").setLevel(logging.WARNING)


def wait_until_running(console: Console, name: str = APPLICATION) -> None:
    """Print a line a deployment as it gets healthy. Raises ConfigError with Serve's reason if it fails."""
    started = time.monotonic()
    healthy: set[str] = set()
    with console.status("starting deployments") as spinner:
        while True:
            time.sleep(POLL_S)
            overview = serve.status().applications.get(name)
            if overview is None:
                continue
            for deployment, state in overview.deployments.items():
                if state.status == DeploymentStatus.HEALTHY and deployment not in healthy:
                    healthy.add(deployment)
                    seconds = time.monotonic() - started
                    console.print(f"[green]✓[/] {deployment:<51} {seconds:5.1f} s", highlight=False)
            waiting = sorted(set(overview.deployments) - healthy)
            spinner.update(f"starting {', '.join(waiting)}")
            if overview.status == ApplicationStatus.RUNNING:
                return
            if overview.status == ApplicationStatus.DEPLOY_FAILED:
                raise ConfigError(_reason(overview))


def _reason(overview: Any) -> str:
    """The innermost line that says what to change; the whole message where there is none."""
    messages = [overview.message, *(state.message for state in overview.deployments.values())]
    for message in messages:
        for line in reversed(message.splitlines()):
            for kind in ("ConfigError: ", "ModelFileError: "):
                if kind in line:
                    return line.split(kind, 1)[1].strip()
    return "the deployments failed to start:\n" + "\n".join(filter(None, messages))
