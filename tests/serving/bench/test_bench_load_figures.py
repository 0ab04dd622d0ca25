"""Percentiles, goodput and rates, against figures worked out by hand."""

import io
import json
import math
from array import array

import msgspec
import pytest
from rich.console import Console

from serving.bench.load.figures import Slo, figures, percentiles
from serving.bench.load.plot import write_plot
from serving.bench.load.record import Record
from serving.bench.load.report import Report, RunReport, print_run, request_rows, write_json


def answered(due_s, ttft_s, tokens, token_s, gaps=()):
    end_s = due_s + ttft_s + token_s * (tokens - 1)
    return Record(
        session=0, turn=0, due_s=due_s, sent_s=due_s + 0.001, first_s=due_s + ttft_s, end_s=end_s,
        gaps_ms=array("f", gaps), prompt_tokens=10, output_tokens=tokens, state="ok",
    )  # fmt: skip


def refused():
    return Record(
        0, 0, 0.0, sent_s=0.0, end_s=0.1, state="refused", kind="HTTP 503", message="full", refusals=1
    )


def test_percentiles_are_linear_between_ranks():
    """Of 1 to 101 they are 51, 91 and 100; nan is no value; none of nothing."""
    found = percentiles([*map(float, range(1, 102)), math.nan])
    assert (found.p50, found.p90, found.p99, found.max) == (51, 91, 100, 101)
    assert percentiles([1.0, 2.0]).p50 == 1.5
    assert percentiles([math.nan]) is None


def test_goodput_counts_refusals_and_failures_as_misses():
    """Of 5 that ended, 2 kept both limits: 40 %, in 4 s one each 2 s. What was cut off is not counted."""
    records = [
        answered(0, 0.100, 11, 0.050),
        answered(0, 0.200, 1, 0.0),  # one token: no time a token to miss
        answered(0, 0.201, 11, 0.050),  # first token too late
        answered(0, 0.100, 11, 0.051),  # tokens too slow
        refused(),
        Record(0, 0, 0.0, sent_s=0.0),
    ]
    found = figures(records, 4.0, Slo(ttft_ms=200.01, tpot_ms=50.01))
    assert (found.goodput.num_met, found.goodput.share, found.goodput.per_s) == (2, 0.4, 0.5)
    assert (found.num_sent, found.num_ok, found.num_refused, found.num_unfinished) == (6, 4, 1, 1)
    assert figures(records, 4.0, None).goodput is None


def test_latencies_count_from_when_a_request_was_due():
    """Also for one that was sent late; rates are over the run, and of whole answers only."""
    late = answered(1.0, 0.5, 5, 0.1, gaps=(100, 100, 100, 100))
    late.sent_s = 1.3
    found = figures([late, refused()], 2.0, None)
    assert found.ttft_ms.p50 == pytest.approx(500) and found.e2e_ms.p50 == pytest.approx(900)
    assert found.tpot_ms.p50 == pytest.approx(100) and found.inter_token_ms.p50 == pytest.approx(100)
    assert found.lateness_ms.max == pytest.approx(300)
    assert (found.tokens_per_s, found.requests_per_s) == (2.5, 0.5)


def test_failures_are_grouped_by_kind_most_frequent_first():
    """With the first one's words."""
    broken = Record(0, 0, 0.0, state="failed", kind="broken stream", message="gone")
    found = figures([broken, refused(), refused()], 1.0, None).failures
    assert [(f.kind, f.is_refusal, f.num_requests, f.example) for f in found] == [
        ("HTTP 503", True, 2, "full"),
        ("broken stream", False, 1, "gone"),
    ]


@pytest.fixture
def report():
    records = [answered(0.1 * n, 0.1 + 0.01 * n, 5, 0.02, gaps=(20,) * 4) for n in range(10)] + [refused()]
    slo = Slo(ttft_ms=151)
    run = RunReport(
        streams=None, rate=10.0, figures=figures(records, 2.0, slo), cpu_s=0.1, is_interrupted=False,
        requests=request_rows(records),
    )  # fmt: skip
    return Report(
        date="2026-01-01", command="x", endpoint="http://h", model="m", workload="w", seed=0, slo=slo,
        notes=(), runs=(run,),
    )  # fmt: skip


def test_the_json_holds_every_figure_and_request(report, tmp_path):
    """It is JSON that reads back equal, with null for what never came."""
    write_json(report, tmp_path / "load.json")
    raw = (tmp_path / "load.json").read_bytes()
    assert msgspec.json.decode(raw, type=Report) == report
    assert json.loads(raw)["runs"][0]["requests"][-1]["ttft_ms"] is None


def test_the_table_says_what_the_figures_say(report):
    """TTFT p50 is 145 ms, goodput 6 of 11."""
    console = Console(width=140, record=True, file=io.StringIO())
    print_run(report.runs[0], report.slo, console)
    text = console.export_text()
    assert "11 sent in 2.0 s, 10 answered, 1 refused, 0 failed" in text
    assert "145.0" in text and "54.5 % of requests, 3.00/s" in text


def test_the_plot_is_a_picture(report, tmp_path):
    """A PNG, also of a run in which nothing was answered."""
    write_plot(report, tmp_path / "load.png")
    assert (tmp_path / "load.png").read_bytes().startswith(b"\x89PNG")
    empty = msgspec.structs.replace(
        report, runs=(msgspec.structs.replace(report.runs[0], requests=report.runs[0].requests[-1:]),)
    )
    write_plot(empty, tmp_path / "empty.png")
