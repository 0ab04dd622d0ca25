"""The kernels' benchmark: rehearsed whole, and what it makes of a case that is wrong or breaks."""

import json
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
import torch
from triton.errors import TritonError

from kernels.bench import run, worker
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


@pytest.mark.parametrize("error", [RuntimeError("out of\nmemory"), AssertionError(), TritonError("no")])
def test_a_case_that_fails_is_a_line(error):
    """With its error, and the process goes on."""

    def fail() -> torch.Tensor:
        raise error

    line = worker._line("family", replace(case(2.0), run=fail), Place("cpu", tiny=True))
    assert line["family"] == "family" and line["shape"] == "[2]"
    assert line["why"].startswith(type(error).__name__) and "\n" not in line["why"]


def processes(monkeypatch, line_of):
    """Every process that would run cases runs `line_of(the case it starts at)` instead."""
    real = subprocess.Popen
    monkeypatch.setattr(
        subprocess,
        "Popen",
        lambda command, **options: real([sys.executable, "-c", line_of(int(command[4]))], **options),
    )
    monkeypatch.setattr(run, "Measured", lambda n: n)


def test_a_case_that_breaks_its_process_is_left_behind(monkeypatch):
    """What was measured before it is kept, and what comes after it is measured; a context lost behind a
    case that has its line costs a process, and no case."""
    lines = {
        0: """print('{"n": 0}', flush=True); raise SystemExit("no such luck")""",
        2: f"""print('{{"n": 2}}', flush=True); raise SystemExit({worker.CONTEXT_LOST})""",
        3: """print('{"family": "family", "shape": "[3]", "why": "KeyError: no"}'); print('{"n": 4}')""",
    }
    processes(monkeypatch, lines.__getitem__)
    found = list(run.measure_families(["family"], tiny=True))
    broken = run.Broken("family", "case 1", "exit 1: no such luck")
    assert found == [0, broken, 2, run.Broken("family", "[3]", "KeyError: no"), 4]


def test_a_family_that_always_breaks_ends(monkeypatch):
    """Two in a row are not the fault of a case; it says that there was more."""
    processes(monkeypatch, lambda start: "1 / 0")
    found = list(run.measure_families(["family"], tiny=True))
    assert [one.shape for one in found] == ["case 0", "case 1"]
    assert all("ZeroDivisionError" in one.why for one in found)
    assert "not run" in found[1].why


def test_a_process_that_hangs_is_ended(monkeypatch):
    """It counts as broken, and how long it was given is said."""
    monkeypatch.setattr(run, "_LIMIT_S", 0.2)
    processes(monkeypatch, lambda start: "import time; time.sleep(60)")
    first = next(run.measure_families(["family"], tiny=True))
    assert "after 0 s" in first.why


def test_a_report_says_what_it_is_of(tmp_path):
    """Date, versions and command, to the letter."""
    told = run.provenance()
    assert told["torch"] == torch.__version__ and told["command"].startswith("python -m kernels.bench")
    assert abs(datetime.fromisoformat(told["date"]) - datetime.now(UTC)) < timedelta(minutes=1)
