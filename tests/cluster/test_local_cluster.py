"""One real Ray cluster of two pretend regions on this machine, as its owner and its users see it.

Owner and drivers are processes of their own, so that pytest's never holds a Ray connection.
"""

import json
import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

REPOSITORY = Path(__file__).parents[2]
REGIONS = ["eu-west", "us-east"]

OWNER = """
import json, sys
from pathlib import Path
import ray
from cluster.local import LocalCluster, NodeSpec

labels = "ray.io/availability-region"
nodes = [NodeSpec({labels: "eu-west"}, num_cpus=1), NodeSpec({labels: "us-east"}, num_cpus=1, num_gpus=2)]
with LocalCluster(nodes, state_folder=Path(sys.argv[1])) as cluster:
    ray.init(address=cluster.address, log_to_driver=False, logging_level="error")
    told = {"address": cluster.address, "pids": cluster.pids(), "environment": cluster.environment}
    ray.shutdown()
    print(json.dumps(told), flush=True)
    sys.stdin.readline()
print("stopped", flush=True)
"""

DRIVER = """
import json, os, subprocess, sys
import ray

ray.init(address=sys.argv[1], log_to_driver=False, logging_level="error")

@ray.remote(num_cpus=0, label_selector={"ray.io/availability-region": "us-east"})
class Worker:
    def look(self):
        # Outlives its parent, has a session of its own, and ignores a polite request to end.
        child = subprocess.Popen(["setsid", "sh", "-c", "trap '' TERM HUP; sleep 600"])
        return ray.get_runtime_context().get_node_labels(), child.pid, os.getpid()

worker = Worker.options(name="held", namespace="test", lifetime="detached").remote()
labels, child_pid, worker_pid = ray.get(worker.look.remote())
nodes = [
    {"labels": node["Labels"], "resources": node["Resources"], "ip": node["NodeManagerAddress"]}
    for node in ray.nodes()
]
print(json.dumps({"nodes": nodes, "labels": labels, "child_pid": child_pid, "worker_pid": worker_pid}))
"""


@dataclass
class Owner:
    process: subprocess.Popen[str]
    address: str
    environment: dict[str, str]
    members: list[psutil.Process]

    def listening(self) -> list[tuple[str, str]]:
        """(address, process name) of every TCP socket of the cluster that listens."""
        found = []
        for member in self.members:
            listeners = [c for c in member.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
            found += [(c.laddr.ip, member.name()) for c in listeners]
        return found

    def survivors(self, within_s: float) -> list[psutil.Process]:
        return psutil.wait_procs(self.members, timeout=within_s)[1]


@pytest.fixture
def start_owner(tmp_path: Path) -> Iterator[Callable[[], Owner]]:
    started: list[Owner] = []

    def start() -> Owner:
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "RAY_ADDRESS": "203.0.113.1:6379"}
        process = subprocess.Popen(
            [sys.executable, "-c", OWNER, str(tmp_path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        assert process.stdout is not None
        told = json.loads(process.stdout.readline())
        members = [psutil.Process(pid) for pid in told["pids"]]
        started.append(Owner(process, told["address"], told["environment"], members))
        return started[-1]

    yield start
    for owner in started:
        owner.process.kill()
        owner.process.wait()
        for member in owner.survivors(within_s=10.0):
            member.kill()


def _drive(owner: Owner) -> dict:
    driven = subprocess.run(
        [sys.executable, "-c", DRIVER, owner.address],
        env={**os.environ, **owner.environment},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert driven.returncode == 0, driven.stderr
    told = json.loads(driven.stdout.splitlines()[-1])
    owner.members += [psutil.Process(told["child_pid"]), psutil.Process(told["worker_pid"])]
    return told


def _status(url: str, token: str | None) -> int:
    """HTTP status of a GET, by hand: proxies and Ray's own clients stay out of it."""
    host, port = url.removeprefix("http://").split(":")
    header = f"Authorization: Bearer {token}\r\n" if token else ""
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        request = (
            f"GET /api/serve/applications/ HTTP/1.1\r\nHost: {host}\r\n{header}Connection: close\r\n\r\n"
        )
        connection.sendall(request.encode())
        return int(connection.recv(4096).split()[1])


def test_regions_on_loopback_with_a_token_and_nothing_left_of_a_killed_owner(
    start_owner: Callable[[], Owner], tmp_path: Path
) -> None:
    """A driver in another process sees the regions; no port is open to the network; no token, no answer.

    When the owner is killed, all of it is gone within 10 s: a worker's stubborn child too.
    """
    owner = start_owner()
    seen = _drive(owner)

    nodes = sorted(seen["nodes"], key=lambda node: node["labels"]["ray.io/availability-region"])
    assert [node["labels"]["ray.io/availability-region"] for node in nodes] == REGIONS
    assert [node["ip"] for node in nodes] == ["127.0.0.1"] * 2
    assert [node["resources"].get("GPU", 0) for node in nodes] == [0, 2]
    assert seen["labels"]["ray.io/availability-region"] == "us-east"

    listening = owner.listening()
    assert len(listening) >= 6
    outward = [found for found in listening if found[0].removeprefix("::ffff:") != "127.0.0.1"]
    assert outward == []

    token_file = tmp_path / "ray_token"
    assert stat.S_IMODE(token_file.stat().st_mode) == 0o600
    dashboard = owner.environment["RAY_DASHBOARD_ADDRESS"]
    assert _status(dashboard, None) == 401
    assert _status(dashboard, token_file.read_text()) == 200

    folder = _folder(owner)
    owner.process.send_signal(signal.SIGKILL)
    owner.process.wait()
    assert owner.survivors(within_s=10.0) == []
    assert not folder.exists()


@pytest.mark.full
def test_stop_leaves_no_process(start_owner: Callable[[], Owner]) -> None:
    """When stop() returns nothing is left, not even what a worker had put into a session of its own."""
    owner = start_owner()
    folder = _folder(owner)
    _drive(owner)
    out, _ = owner.process.communicate("\n", timeout=30)
    assert out == "stopped\n" and owner.process.returncode == 0
    assert owner.survivors(within_s=0.5) == []
    assert not folder.exists()


def _folder(owner: Owner) -> Path:
    """Ray's session folder, as the process that holds the nodes was told."""
    folder = Path(json.loads(owner.members[0].cmdline()[-1])["remove_folder"])
    assert folder.exists()
    return folder
