"""Real clusters for the end-to-end tests: `searoom up` in its own process, with its own state folder."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import openai
import psutil
import pytest
from ray._private.ray_constants import ENABLE_RAY_CLUSTERS_ENV_VAR

START_TIMEOUT_S = 180

# The fleet of mock engines
FLEET_REPLICAS = 4
FLEET_BLOCKS = 400  # a replica
FLEET_DEADLINE_S = 30.0  # of a request


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass
class Up:
    """One running `searoom up`."""

    process: subprocess.Popen
    state: Path
    log: Path
    endpoint: str
    dashboard: str
    key: str
    model: str
    children: list[psutil.Process] = field(default_factory=list)

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"}

    @property
    def ray_environment(self) -> dict[str, str]:
        """What another process needs to join the Ray cluster."""
        token = str(self.state / "searoom" / "ray_token")
        return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": token, ENABLE_RAY_CLUSTERS_ENV_VAR: "0"}

    def client(self, **options) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.endpoint}/v1", api_key=self.key, max_retries=0, **options)

    def async_client(self, **options) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.endpoint}/v1", api_key=self.key, max_retries=0, **options)

    def status(self) -> dict:
        return httpx.get(f"{self.endpoint}/status", headers=self.headers, timeout=10).json()

    def run(self, *args: str, check: bool = True) -> subprocess.CompletedProcess:
        """A `searoom` command beside this cluster."""
        return searoom(*args, state=self.state, check=check)

    def processes(self, name: str) -> list[psutil.Process]:
        """This cluster's processes whose title holds `name` (Ray titles its actors by class)."""
        return [p for p in psutil.Process(self.process.pid).children(recursive=True) if name in title(p)]


def title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def environment(state: Path) -> dict[str, str]:
    return {**os.environ, "XDG_STATE_HOME": str(state), "NO_COLOR": "1", "COLUMNS": "160"}


def searoom(*args: str, state: Path, check: bool = True) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "serving", *args]
    return subprocess.run(
        command, env=environment(state), capture_output=True, text=True, check=check, timeout=180
    )


def start(folder: Path, *args: str) -> Up:
    """Start `searoom up` and wait until it says where it is."""
    state, log = folder / "state", folder / "up.log"
    port, dashboard_port = free_port(), free_port()
    command = [sys.executable, "-m", "serving", "up", "--port", str(port)]
    command += ["--dashboard-port", str(dashboard_port), *args]
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment(state))
    running = state / "searoom" / "running.json"
    deadline = time.monotonic() + START_TIMEOUT_S
    while not (running.exists() and json.loads(running.read_text())["ready"]):
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            pytest.fail(f"searoom up {' '.join(args)} did not start:\n{log.read_text()}")
        time.sleep(0.2)
    facts = json.loads(running.read_text())
    key = (state / "searoom" / "api_key").read_text().strip()
    return Up(process, state, log, facts["endpoint"], facts["dashboard"], key, facts["model"])


def stop(up: Up, number: int = signal.SIGINT) -> list[psutil.Process]:
    """Stop it as a person would; returns what is left of its processes."""
    tree = psutil.Process(up.process.pid).children(recursive=True)
    up.process.send_signal(number)
    up.process.wait(60)
    _, alive = psutil.wait_procs(tree, timeout=10)
    return alive


def eventually(condition, timeout_s: float = 30.0, interval_s: float = 0.1):
    """The first true value of `condition()`; fails with the last value when it never comes."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        if time.monotonic() > deadline:
            pytest.fail(f"not within {timeout_s} s: {condition} gave {value!r}")
        time.sleep(interval_s)
    return value
