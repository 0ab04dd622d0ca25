"""The one call that measures a GPU: its jobs' ends, and the page it makes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.benchmarks.gpu_summary import summary, targets

SCRIPT = Path(__file__).parent / "gpu.py"


def run_script(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def workload(kind: str, requests: int, **figures: float) -> dict:
    fields = {"name": f"{kind} {requests}", "kind": kind, "requests": requests, "phase_floor_share": 0.75}
    idle = {"traced_idle_share": 0.03, "untraced_idle_share": 0.01, "bandwidth_share": 0.81}
    return fields | idle | figures


def test_targets_are_held_against_their_figures():
    """A floor must be reached, an idle share kept below; what was not measured is neither."""
    files = {
        "engine-8b": {"workloads": [workload("batch", 256), workload("decode", 1), workload("decode", 32)]},
        "kernels": {"cases": [
            {"family": "paged_decode", "shape": "decode B=1", "us": 10.0, "share": 0.9, "flops": 1},
            {"family": "paged_decode", "shape": "decode B=8", "us": 10.0, "share": 0.8, "flops": 1},
        ]},
    }  # fmt: skip
    found = {row[0]: row[2:] for row in targets(files)}
    assert found["8b, batch 256: of the phases' floor"] == ("75.0%", "**missed**")
    assert found["8b, batch-1 decode, of bandwidth"] == ("81.0%", "pass")
    assert found["8b, decode 32: GPU idle, traced"] == ("3.0%", "**missed**")
    assert found["8b, decode 32: GPU idle, untraced"] == ("1.0%", "pass")
    assert found["decode attention at 256k tokens of KV, worst shape, of bandwidth"] == (
        "80.0%",
        "**missed**",
    )
    assert found["prefill attention, 8k, head dim 128, TFLOP/s"] == ("–", "not measured")
    assert "8b, decode 1: GPU idle, traced" not in found


def test_the_page_tells_what_failed(tmp_path):
    """Runs of several calls, in folders of their own, stand in one table; those that failed have words."""
    for call, status in (("a", 0), ("b", "stopped after 5 s")):
        (tmp_path / call).mkdir()
        run = {"job": f"job-{call}", "command": "python x", "status": status, "seconds": 1.0}
        run |= {"started": f"2026-01-0{len(call)}", "last": ["out of cheese"]}
        (tmp_path / call / "runs.json").write_text(json.dumps([run]))
    page = summary(tmp_path)
    assert "| job-a | `python x` | ok | 1 |" in page
    assert "| job-b | `python x` | stopped after 5 s | 1 |" in page
    assert page.count("out of cheese") == 1


def test_a_job_without_time_is_told(tmp_path):
    """With no minute left nothing runs, and the page and the status say so."""
    ran = run_script(str(tmp_path), "collectives", "--rehearse", "--minutes", "0")
    assert ran.returncode == 1, ran.stderr
    (run,) = json.loads((tmp_path / "runs.json").read_text())
    assert (run["job"], run["status"]) == ("collectives", "no time was left")
    assert "no time was left" in (tmp_path / "summary.md").read_text()


def test_an_unknown_part_is_refused(tmp_path):
    """The error names the parts there are."""
    ran = run_script(str(tmp_path), "kernel")
    assert ran.returncode == 1 and "there is no part kernel: choose from tests, collectives" in ran.stderr


@pytest.mark.full
def test_a_part_is_rehearsed(tmp_path):
    """Its figures, what it said and the page are there, and it is called a rehearsal."""
    assert run_script(str(tmp_path), "collectives", "--rehearse").returncode == 0
    assert len(json.loads((tmp_path / "collectives.json").read_text())["results"]) == 12
    assert "no link is crossed" in (tmp_path / "log.txt").read_text()
    page = (tmp_path / "summary.md").read_text()
    assert "A rehearsal on a CPU" in page and "## All-reduce: gloo" in page
