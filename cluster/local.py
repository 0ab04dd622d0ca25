"""A Ray cluster on this machine, for `searoom up` and tests: one raylet a pretend node.

    with LocalCluster([NodeSpec({REGION_LABEL: "eu"}), NodeSpec({REGION_LABEL: "us"})]) as cluster:
        ray.init(address=cluster.address)

Everything listens on 127.0.0.1, asks for a token, and reports nothing to anyone. Nothing outlives
the process that started it, however that ends; no Ray process that is not ours is touched, and no
file is left where another cluster would find it. `environment` is what another shell needs.
"""

from __future__ import annotations

import json
import os
import secrets
import select
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
from collections import deque
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from ray._private import ray_constants
from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

HOST = "127.0.0.1"
HOLDER = Path(__file__).with_name("local_nodes.py")
DEFAULT_OBJECT_STORE_BYTES = 128 << 20
MIN_OBJECT_STORE_BYTES = 75 << 20  # Ray takes no less
START_TIMEOUT_S = 90.0
STOP_TIMEOUT_S = 20.0
MAX_FOLDER_BYTES = 35  # of the 107 of a Unix socket's path, Ray's own part below takes up to 72
LOG_NAME = "nodes.log"
LOG_TAIL_LINES = 12
# A variable of another cluster, which would take this one's place.
FOREIGN_VARIABLES = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_REDIS_ADDRESS", "RAY_AUTH_TOKEN")


class ClusterStartError(Exception):
    """The local cluster did not start. Says why, with the end of the log that tells."""


@dataclass(frozen=True)
class NodeSpec:
    """One pretend node. `num_cpus` None: all of this machine's. GPUs are only counted, not looked for."""

    labels: dict[str, str] = field(default_factory=dict)
    num_cpus: float | None = None
    num_gpus: int = 0


class LocalCluster:
    """The first of `nodes` is the head: dashboard and control plane, and Serve's proxy with HeadOnly.

    `dashboard_port` None takes the first free one from 8265, `metrics_port` 0 any free one (the
    head's Prometheus endpoint). `state_folder` keeps the token between runs; `folder` takes Ray's
    session and logs, by default a fresh one under /tmp that goes when the cluster does.
    """

    def __init__(
        self,
        nodes: list[NodeSpec],
        *,
        dashboard_port: int | None = None,
        metrics_port: int = 0,
        object_store_bytes: int = DEFAULT_OBJECT_STORE_BYTES,
        state_folder: Path | None = None,
        folder: Path | None = None,
    ) -> None:
        if not nodes:
            raise ValueError("nodes: a cluster needs at least one")
        if object_store_bytes < MIN_OBJECT_STORE_BYTES:
            raise ValueError(f"object_store_bytes: Ray takes no less than {MIN_OBJECT_STORE_BYTES}")
        if folder is not None and len(os.fsencode(folder)) > MAX_FOLDER_BYTES:
            raise ValueError(
                f"folder: longer than {MAX_FOLDER_BYTES} bytes, too long for Ray's sockets: {folder}"
            )
        self._nodes = nodes
        self._dashboard_port = dashboard_port
        self._metrics_port = metrics_port
        self._object_store_bytes = object_store_bytes
        self._token_path = (state_folder or _state_folder()) / "ray_token"
        self._given_folder = folder
        self._holder: subprocess.Popen[bytes] | None = None
        self._lifeline_fd = -1
        self._folder = Path()
        self._environment_before: dict[str, str | None] = {}
        self.address = ""
        self.dashboard_url = ""

    def __enter__(self) -> LocalCluster:
        self.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self.stop()

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to use the cluster: `ray`, `serve`, and `ray.init(address=...)`."""
        found = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self._token_path),
            "RAY_USAGE_STATS_ENABLED": "0",
            # Else ray.init() takes 127.0.0.1 for a mistake, and tries the machine's outward address.
            ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR: "0",
        }
        if self.dashboard_url:
            found |= {
                "RAY_API_SERVER_ADDRESS": self.dashboard_url,
                "RAY_DASHBOARD_ADDRESS": self.dashboard_url,
            }
        return found

    def start(self) -> None:
        """Start all nodes, and let this process join: `ray.init(address=self.address)` works from here on.

        Raises ClusterStartError.
        """
        assert self._holder is None, "already started"
        if self._dashboard_port is not None:
            _require_free(self._dashboard_port)
        _ensure_token(self._token_path)
        self._folder = self._given_folder or Path(tempfile.mkdtemp(prefix="searoom-", dir="/tmp"))
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with ExitStack() as on_failure:  # Ctrl-C too
            on_failure.callback(self.stop)
            ready = self._start_holder()
            if ready is None:
                raise ClusterStartError(_explain(self._folder))
            self.address, self.dashboard_url = ready["address"], f"http://{ready['dashboard']}"
            self._join()
            on_failure.pop_all()

    def _start_holder(self) -> dict[str, str] | None:
        """What the holder says when all nodes stand; None when it fails."""
        lifeline_fd, self._lifeline_fd = os.pipe()
        ready_fd, told_fd = os.pipe()
        arguments = {
            "nodes": [self._node_arguments(index) for index in range(len(self._nodes))],
            "lifeline_fd": lifeline_fd,
            "ready_fd": told_fd,
            "remove_folder": str(self._folder) if self._given_folder is None else None,
        }
        with (self._folder / LOG_NAME).open("wb") as log, os.fdopen(ready_fd, "rb") as ready:
            self._holder = subprocess.Popen(
                [sys.executable, "-P", str(HOLDER), json.dumps(arguments)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(lifeline_fd, told_fd),
                env=self._holder_environment(),
                start_new_session=True,  # a Ctrl-C is for the owner, who takes Serve down first
            )
            os.close(lifeline_fd)
            os.close(told_fd)
            line = ready.readline() if select.select([ready], [], [], START_TIMEOUT_S)[0] else b""
        return json.loads(line) if line else None

    def stop(self) -> None:
        """End every process of the cluster. Does nothing when it is not running."""
        if self._holder is None:
            return
        members = _family(self._holder.pid)
        os.close(self._lifeline_fd)
        if not self.address:  # still starting, and deaf to the lifeline
            self._holder.terminate()
        try:
            self._holder.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._holder.kill()
            self._holder.wait()
        for member in members:  # of a holder that was killed
            if member.is_running():
                member.kill()
        psutil.wait_procs(members, timeout=STOP_TIMEOUT_S)
        self._holder = None
        self._leave()
        if self._given_folder is None:
            shutil.rmtree(self._folder, ignore_errors=True)
        self.address = self.dashboard_url = ""

    def pids(self) -> list[int]:
        """Every process of the cluster now, the one that holds it first."""
        return [member.pid for member in _family(self._holder.pid)] if self._holder is not None else []

    def _node_arguments(self, index: int) -> dict[str, Any]:
        node = self._nodes[index]
        arguments: dict[str, Any] = {
            "num_cpus": len(os.sched_getaffinity(0)) if node.num_cpus is None else node.num_cpus,
            "num_gpus": node.num_gpus,
            "labels": node.labels,
            "object_store_memory": self._object_store_bytes,
            "node_ip_address": HOST,
            "dashboard_agent_listen_port": 0,
        }
        if index == 0:
            arguments |= {
                "include_dashboard": True,
                "dashboard_host": HOST,
                "dashboard_port": self._dashboard_port,
                "metrics_export_port": self._metrics_port,
            }
        return arguments

    def _holder_environment(self) -> dict[str, str]:
        inherited = {name: value for name, value in os.environ.items() if name not in FOREIGN_VARIABLES}
        autoscaler_port, dashboard_port = _free_ports(2)
        ours = {
            # A job's entrypoint `python` is the cluster's, whatever was activated in the shell.
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
            # Ray's defaults are fixed: a second cluster would list the first one's figures as its own.
            "AUTOSCALER_METRIC_PORT": str(autoscaler_port),
            "DASHBOARD_METRIC_PORT": str(dashboard_port),
            "TMPDIR": str(self._folder),  # what the killed leave behind goes with the folder
            "RAY_TMPDIR": str(self._folder),  # else drivers of other clusters would find this one
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
            "RAY_worker_niceness": "0",  # Ray's 15 is for batch work: whatever else runs would come first
        }
        return inherited | self.environment | ours

    def _join(self) -> None:
        """Ray reads its environment when it is imported, which has happened; so it is told."""
        ours: dict[str, str | None] = {**dict.fromkeys(FOREIGN_VARIABLES), **self.environment}
        self._environment_before = {name: os.environ.get(name) for name in ours}
        _tell_ray(ours, may_leave_loopback=False)

    def _leave(self) -> None:
        if self._environment_before:
            _tell_ray(self._environment_before, may_leave_loopback=True)
            self._environment_before = {}


def _tell_ray(environment: dict[str, str | None], *, may_leave_loopback: bool) -> None:
    for name, value in environment.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    ray_constants.ENABLE_RAY_CLUSTER = may_leave_loopback
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


def _ensure_token(path: Path) -> None:
    """A token only we can read: the one that is there, unless others could read it too."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if path.exists() and stat.S_IMODE(path.stat().st_mode) & 0o077 == 0:
        return
    fresh = path.with_name(f"{path.name}.{os.getpid()}")
    with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(secrets.token_hex(32))
    fresh.replace(path)


def _state_folder() -> Path:
    base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(base) / "searoom"


def _require_free(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the dashboard: a closed port is free
        try:
            probe.bind((HOST, port))
        except OSError as taken:
            raise ClusterStartError(f"dashboard port {port} on {HOST} is in use; choose another") from taken


def _free_ports(count: int) -> list[int]:
    with ExitStack() as open_until_all_are_found:
        probes = [open_until_all_are_found.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind((HOST, 0))
        return [probe.getsockname()[1] for probe in probes]


def _family(pid: int) -> list[psutil.Process]:
    """The process and all below it; empty when it is gone."""
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _explain(folder: Path) -> str:
    """The ends of the logs that may tell why the nodes did not come up."""
    logs = [folder / LOG_NAME, *sorted(folder.glob("ray/session_2*/logs/*.err"))]
    tails = [(log.name, _tail(log)) for log in logs]
    shown = "\n".join(f"{name}:\n{tail}" for name, tail in tails if tail)
    return f"the local Ray cluster did not start.\n{shown}"


def _tail(log: Path) -> str:
    with log.open(errors="replace") as lines:
        return "".join(f"  {line}" for line in deque(lines, LOG_TAIL_LINES)).rstrip()
