"""The figures made of runs, and what a report says of them."""

import io

import pytest
from rich.console import Console

from serving.bench.engine.figures import Load, Point, Sample, first_token_agreement, percentile, summarise
from serving.bench.engine.report import MachineFacts, Report, Row, read_json, verdicts, write_json
from serving.bench.engine.tables import print_report
from serving.engine.machine import Machine
from serving.errors import ConfigError
from serving.messages import StepStats

DECODE = Load("decode", 2, 40, 3)
MACHINE = Machine(flops_per_s=1e12, bytes_per_s=1e10)


def stats(step_ms: float, prefill_tokens: int, flops: float = 0.0, bytes_moved: float = 0.0) -> StepStats:
    fields = {name: 0 for name in StepStats.__struct_fields__}
    given = {
        "step_ms": step_ms,
        "prefill_tokens": prefill_tokens,
        "flops": flops,
        "bytes_moved": bytes_moved,
        "bound": "memory",
    }
    return StepStats(**(fields | given))


def point(row: str, tokens_per_s: float, load: Load = DECODE, **figures: float) -> Point:
    return Point(
        row=row,
        load=load,
        tokens_per_s=tokens_per_s,
        slowest_tokens_per_s=tokens_per_s,
        fastest_tokens_per_s=tokens_per_s,
        ttft_p50_ms=1.0,
        tpot_p50_ms=1.0,
        tpot_p99_ms=1.0,
        **figures,
    )


def report(*points: Point) -> Report:
    return Report(
        date="2026-11-22",
        command="python -m serving.bench engine",
        model="tiny",
        machine=MachineFacts("a CPU", 2, 2e10, {"bfloat16": 4e11}),
        repeats=3,
        rows=(
            Row("searoom bfloat16", "ours", "bfloat16", "bfloat16"),
            Row("searoom int8", "ours", "as stored", "int8"),
            Row("vllm", "vLLM-CPU", "bfloat16", "bfloat16", "vllm"),
        ),
        points=points,
        failures=("llama.cpp (x) ended [status 1]",),
    )


def test_percentiles_interpolate():
    """The median of an even number of values lies between the middle two."""
    assert percentile([4.0, 1.0, 3.0, 2.0], 50) == 2.5
    assert percentile([1.0, 2.0], 99) == pytest.approx(1.99)


def test_rates_are_medians_and_times_are_pooled():
    """Tokens/s is the median over runs, TTFT over sequences, TPOT over the gaps between tokens."""
    runs = [
        Sample(elapsed, ((first, first + 0.1, first + 0.3), (first, first + 0.1, first + 0.3)), ())
        for elapsed, first in ((1.0, 0.5), (2.0, 0.6), (3.0, 0.9))
    ]
    found = summarise("x", DECODE, runs)
    assert found.tokens_per_s == 6 / 2.0
    assert (found.slowest_tokens_per_s, found.fastest_tokens_per_s) == (2.0, 6.0)
    assert found.ttft_p50_ms == pytest.approx(600)
    assert found.tpot_p50_ms == pytest.approx(150)
    assert found.overhead_share is None


def test_a_prefill_counts_prompt_tokens_and_has_no_tpot():
    """One token drawn leaves no gap to measure."""
    found = summarise("x", Load("prefill", 1, 1024, 1), [Sample(2.0, ((2.0,),), ((7,),))])
    assert found.tokens_per_s == 512
    assert found.tpot_p50_ms is None


def test_shares_are_of_decode_steps():
    """Overhead and floors leave out the steps that prefill; a step is bound by its slower resource."""
    steps = (stats(100.0, 40), stats(10.0, 0, flops=1e9, bytes_moved=5e7), stats(10.0, 0, 8e9, 5e7))
    run = Sample(0.12, ((0.1, 0.11, 0.12),) * 2, (), steps, (10.0, 9.0, 8.0))
    found = summarise("x", DECODE, [run], machine=MACHINE, linear_step_s=0.005)
    assert found.overhead_share == pytest.approx(0.15)
    assert found.bandwidth_share == pytest.approx(0.5)
    assert found.compute_share == pytest.approx(0.45)
    assert found.floor_share == pytest.approx((5 + 8) / 20)
    assert found.linear_bound_tokens_per_s == 400
    assert found.linear_bound_share == pytest.approx(0.5)


def test_first_tokens_are_compared_prompt_by_prompt():
    """Three of four sequences begin alike."""
    ours = [Sample(1.0, (), ((1, 5), (2, 5))), Sample(1.0, (), ((3,), (4,)))]
    theirs = [Sample(1.0, (), ((1, 6), (2, 6))), Sample(1.0, (), ((3,), (9,)))]
    assert first_token_agreement(ours, theirs) == 0.75
    assert first_token_agreement(ours, []) is None


def test_ratios_compare_the_same_load():
    """Ours over the peer's at that batch; unknown where the peer was not measured."""
    other = Load("decode", 8, 40, 3)
    found = report(point("searoom bfloat16", 30.0), point("vllm", 20.0), point("vllm", 5.0, other))
    assert found.ratio(found.points[0], "vllm") == 1.5
    assert found.ratio(found.points[0], "llama.cpp") is None
    assert found.loads == [DECODE, other]


@pytest.mark.parametrize(
    ("bfloat16", "int8", "holds"), [(1.9, 1.2, (True, False)), (1.7, 2.1, (False, True))]
)
def test_equal_bits_and_the_best_format_have_targets_of_their_own(bfloat16, int8, holds):
    """At batch 64 equal bits need 1.8 times vLLM, the best of all rows twice."""
    load = Load("decode", 64, 40, 64)
    found = report(
        point("searoom bfloat16", bfloat16, load, overhead_share=0.11, linear_bound_share=0.8),
        point("searoom int8", int8, load),
        point("vllm", 1.0, load),
    )
    judged = {verdict.what: verdict.holds for verdict in verdicts(found)}
    assert judged == {
        "batch 64, equal bits, tokens/s over vllm": holds[0],
        "batch 64, best format, tokens/s over vllm": holds[1],
        "searoom bfloat16, batch 64: all but the forward, of a step": False,
        "searoom bfloat16, batch 64: share of its linear layers' bound": True,
    }


def test_a_target_without_its_peer_is_open():
    """No vLLM, no verdict: neither passed nor failed."""
    found = verdicts(report(point("searoom bfloat16", 1.0, Load("decode", 8, 40, 64))))
    assert [verdict.holds for verdict in found] == [None, None]


def test_a_report_survives_its_json(tmp_path):
    """What was written is read back equal, and other JSON is refused by name."""
    found = report(point("searoom bfloat16", 30.0, overhead_share=0.1), point("vllm", 20.0))
    write_json(found, tmp_path / "report.json")
    assert read_json(tmp_path / "report.json") == found
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"other\.json: not a report"):
        read_json(tmp_path / "other.json")


def test_the_table_shows_rates_ratios_and_failures():
    """A reader finds each row's rate, our ratio to the peer, and why another is missing."""
    text = io.StringIO()
    found = report(point("searoom bfloat16", 30.0, overhead_share=0.1), point("vllm", 20.0))
    print_report(found, Console(file=text, width=80))
    assert "30.0" in text.getvalue() and "1.50" in text.getvalue()
    assert "error: llama.cpp (x) ended [status 1]" in text.getvalue()
