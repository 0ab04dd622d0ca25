"""The program that times decisions makes real ones, and names its targets."""

import io

import pytest
from rich.console import Console

from serving.bench.router import decisions


def test_decisions_are_made_and_timed():
    """Percentiles are in order and above 0; a fleet size without a target has none."""
    times = decisions.measure(8, 30)
    assert 0 < times.p50_ms <= times.p99_ms
    assert times.target_ms is None and decisions.TARGETS_MS[64] == 0.5


@pytest.mark.parametrize(("p99_ms", "verdict"), [(0.4, "pass"), (0.6, "FAIL")])
def test_the_table_says_what_was_missed(monkeypatch, p99_ms, verdict):
    monkeypatch.setattr(decisions, "measure", lambda size: decisions.DecisionTimes(size, 0.1, p99_ms))
    monkeypatch.setattr(decisions, "SIZES", (64,))
    console = Console(file=io.StringIO(), width=100)
    decisions.measure_decisions(console)
    assert verdict in console.file.getvalue() and "<= 0.5" in console.file.getvalue()
