"""`python -m serving.bench gateway`, very small, on a cluster of its own."""

import json
import subprocess
import sys

import pytest
from clusters import environment


@pytest.mark.full
def test_the_gateway_benchmark_measures_and_leaves_nothing(tmp_path):
    """Every kind of process but the proxy has used CPU, both kinds of call took time, and all is down."""
    report = tmp_path / "report.json"
    flags = ["--streams", "4", "--seconds", "3", "--warm-up", "1", "--calls", "20", "--at-once", "1,4"]
    done = subprocess.run(
        [sys.executable, "-m", "serving.bench", "gateway", *flags, "--json", str(report)],
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(report.read_text())
    throughput = found["throughput"]
    assert throughput["requests"] > 0 and throughput["window_s"] >= 3
    used = throughput["cpu_s"]
    assert all(used[role] > 0 for role in ("Ingress", "Router", "ModelReplica and ranks"))
    assert used["HTTP proxy"] == 0
    assert [hop["concurrency"] for hop in found["hops"]] == [1, 4]
    assert all(hop[kind]["p50"] > 0 for hop in found["hops"] for kind in ("pick_ms", "bare_ms"))
    assert "requests a CPU-second of Ingress and Router" in done.stdout
    assert not (tmp_path / "searoom" / "running.json").exists()
