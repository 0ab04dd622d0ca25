"""The kernels' benchmark: rehearsed whole, and what it makes of a case that is wrong or breaks."""

import json
import subprocess
import sys

import pytest
import torch

from kernels.bench import run
from kernels.bench.case import Case, Peer, Place
from kernels.bench.measure import Ceilings, Measured, measure_case
from kernels.bench.tables import share_of_ceiling
from kernels.bench.worker import FAMILIES

CEILINGS = Ceilings("a GPU", bytes_per_s=1e12, flops_per_s={"bf16": 1e15})


def bench(*options):
    command = [sys.executable, "-m", "kernels.bench", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_every_case_is_rehearsed(tmp_path):
    """The command that a GPU machine will run goes through every family here, and every result is right."""
    report = tmp_path / "report.json"
    done = bench("--rehearse", "--json", str(report))
    assert done.returncode == 0, done.stdout + done.stderr
    cases = json.loads(report.read_text())["cases"]
    assert {case["family"] for case in cases} == FAMILIES.keys()
    assert all(case["error"] <= case["tolerance"] for case in cases)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_to_run():
    """In one line, and fails."""
    done = bench()
    assert done.returncode == 1
    assert "--compile" in done.stderr and "--rehearse" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def case(value, tolerance=1e-3, peers=()):
    return Case(
        shape="[2]",
        run=lambda: torch.tensor([1.0, value]),
        expected=lambda: torch.tensor([1.0, 2.0]).double(),
        moved_bytes=8,
        flops=2,
        bound="memory",
        tolerance=tolerance,
        peers=peers,
    )


@pytest.mark.parametrize("value,right", [(2.0, True), (2.001, True), (2.1, False), (float("nan"), False)])
def test_a_wrong_result_is_wrong(value, right):
    """By its largest error, relative to the largest value; NaN is wrong."""
    measured = measure_case("family", case(value), Place("cpu", tiny=True))
    assert measured.right == right


def test_a_rehearsal_runs_the_peers_that_can():
    """A slip in a peer's call is found before it costs a run; what needs CUDA is left out."""
    ran = []
    peers = (Peer("here", lambda: ran.append("here")), Peer("there", lambda: ran.append("there"), cpu=False))
    measured = measure_case("family", case(2.0, peers=peers), Place("cpu", tiny=True))
    assert ran == ["here"] and measured.peers == {"here": None}
    with pytest.raises(TypeError):
        measure_case("family", case(2.0, peers=(Peer("slip", lambda: len(3)),)), Place("cpu", tiny=True))


def test_a_share_is_of_the_bound_that_holds():
    """Bytes over bandwidth, or operations over the rate of their dtype, each over the time."""

    def measured(bound):
        return Measured("family", "", 0.0, 0.0, 10.0, 5_000_000, 2_000_000_000, bound)

    assert share_of_ceiling(measured("memory"), CEILINGS) == pytest.approx(0.5)
    assert share_of_ceiling(measured("bf16"), CEILINGS) == pytest.approx(0.2)


def test_a_case_that_breaks_its_process_is_left_behind(monkeypatch):
    """What was measured before it is kept, and what comes after it is measured."""
    lines = {
        0: """print('{"n": 0}', flush=True); raise SystemExit("no such luck")""",
        2: """print('{"n": 2}')""",
    }
    real = subprocess.Popen

    def popen(command, **options):
        return real([sys.executable, "-c", lines[int(command[4])]], **options)

    monkeypatch.setattr(subprocess, "Popen", popen)
    monkeypatch.setattr(run, "Measured", lambda n: n)
    found = list(run.measure_families(["family"], tiny=True))
    assert found == [0, run.Broken("family", 1, "exit 1: no such luck"), 2]


def test_a_family_that_always_breaks_ends(monkeypatch):
    """Two in a row are not the fault of a case."""
    real = subprocess.Popen
    monkeypatch.setattr(
        subprocess, "Popen", lambda command, **options: real([sys.executable, "-c", "1 / 0"], **options)
    )
    found = list(run.measure_families(["family"], tiny=True))
    assert [one.index for one in found] == [0, 1]
    assert all("ZeroDivisionError" in one.why for one in found)
