"""What we take from Ray without its promise, on a real cluster: fails when Ray changes it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from cluster.local import LocalCluster, NodeSpec

APP = Path(__file__).with_name("ray_compat_app.py")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What the little application in ray_compat_app.py found out, and the ports its cluster listened on."""
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
    with LocalCluster([NodeSpec()]) as cluster:
        done = subprocess.run(
            [sys.executable, str(APP), cluster.address],
            env=os.environ | cluster.environment | {"PYTHONPATH": str(APP.parent)},
            capture_output=True,
            text=True,
            timeout=90,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        listening = {
            connection.laddr.ip.removeprefix("::ffff:")  # an IPv4 address, bound by an IPv6 socket
            for pid in cluster.pids()
            for connection in psutil.Process(pid).net_connections("tcp")
            if connection.status == psutil.CONN_LISTEN
        }
    patch.undo()
    return json.loads(done.stdout.splitlines()[-1]) | {"listening": sorted(listening)}


def test_a_pinned_call_reaches_its_replica_and_no_other(found):
    """Twenty calls to each of two replicas by id: every answer comes from the one that was named."""
    assert found["answers"] == {name: [name] for name in found["running"]}
    assert len(found["running"]) == 2


def test_a_pinned_stream_comes_from_its_replica(found):
    """Streams are pinned like calls, and closing one ends its generator on the replica."""
    assert found["stream_from"] == found["running"][0]
    assert found["stream_closed"] is True


def test_an_unknown_replica_raises_at_once(found):
    """Serve would wait for it for ever."""
    assert found["unknown"] == "ReplicaGone"


def test_a_death_ends_calls_and_streams_with_replica_gone(found):
    """Within a second, and calls are not sent to the other replica instead."""
    assert found["dead_stream"] == found["dead_call"] == found["call_after"] == "ReplicaGone"
    assert found["death_seen_s"] < 1


def test_the_running_set_follows(found):
    """The dead one leaves it, its successor joins, and nobody is asked."""
    assert found["replaced"] is True


def test_every_port_is_on_loopback(found):
    """Serve's replicas would bind their gRPC port on every interface."""
    assert found["listening"] == ["127.0.0.1"]
