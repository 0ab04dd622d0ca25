"""The run of a large fleet: that it is a run like any other, and its command."""

import io
import json

import msgspec
import typer
from rich.console import Console
from typer.testing import CliRunner

from serving.bench.router import large_fleet
from serving.bench.router.command import router
from serving.bench.router.figures import Objective, figures_of
from serving.bench.router.generated import GeneratorPlan, generate
from serving.bench.router.policies import searoom
from serving.bench.router.reference_fleet import BLOCK_TOKENS
from serving.bench.router.runs import Scenario
from serving.simulator import simulate

app = typer.Typer()
app.command()(router)
LOAD_S = 10.0


def test_its_figures_are_those_of_the_policy_alone():
    """Timing a policy changes nothing; every request is decided on."""
    report = large_fleet.measure(8, LOAD_S, 60, Objective(), Console(file=io.StringIO()))
    setup = Scenario("", num_replicas=8).setup(seed=0)
    plan = GeneratorPlan(num_requests=60, span_s=LOAD_S, lead_s=large_fleet.LEAD_S)
    requests = generate(plan, BLOCK_TOKENS, seed=0).requests
    result = simulate(setup, requests, searoom)
    alone = figures_of("8 replicas", "searoom", 0, requests, result, Objective(), num_replicas=8)
    assert msgspec.structs.replace(report.figures, run_s=0.0) == alone
    assert report.num_requests == 60 and report.num_decisions == 60 + int(result.refusals.sum())
    assert report.decision_cpu_ms > 0 and report.peak_memory_gib > 0 and report.counts["reports"] > 60


def test_the_sample_has_as_much_load_a_replica(monkeypatch):
    """A fifth of a fleet with a fifth of its requests is nearly as busy as the whole."""
    scenario = Scenario("", num_replicas=50)
    plan = GeneratorPlan(num_requests=1000, span_s=60.0, lead_s=60.0)
    whole = large_fleet._utilisation(plan, scenario)
    monkeypatch.setattr(large_fleet, "SAMPLE_REPLICAS", 10)
    assert 0.7 < large_fleet._utilisation(plan, scenario) / whole < 1.4


def test_the_command_tells_and_writes_it(tmp_path):
    """Ten requests a replica, unless said otherwise."""
    path = tmp_path / "fleet.json"
    told = CliRunner().invoke(app, ["--fleet", "4", "--seconds", "8", "--json", str(path)])
    assert told.exit_code == 0, told.output
    assert "4 replicas, 40 requests in 8 s" in told.output and "decisions of" in told.output
    found = json.loads(path.read_text())
    assert found["num_requests"] == 40 and found["figures"]["served_share"] == 1.0
    assert found["cpu_s"] > 0 and found["simulated_s"] > 0
