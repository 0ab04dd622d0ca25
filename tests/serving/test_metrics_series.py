"""The declared series, and the meter that remembers."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving import metrics
from serving.metrics import ALL_SERIES, MemoryMeter, Series

BOUNDED_TAGS = {"model", "region", "replica", "outcome", "node", "gpu"}
# OpenTelemetry's GenAI conventions, gen_ai.server.*
SEMCONV_DURATION_S = {0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92}
SEMCONV_TTFT_S = {
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
}
SEMCONV_TIME_PER_OUTPUT_TOKEN_S = {
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5),
}


@pytest.mark.parametrize("series", ALL_SERIES, ids=lambda series: series.name)
def test_a_series_is_named_with_its_unit_and_has_only_bounded_labels(series: Series) -> None:
    """Names are Prometheus's, prefixed, without `_total`; no label can hold a key, tenant or request."""
    assert re.fullmatch(r"searoom_[a-z][a-z0-9_]*", series.name)
    assert not series.name.endswith(("_total", "_count", "_sum", "_bucket"))
    assert set(series.tags) <= BOUNDED_TAGS
    suffix = {"s": "_seconds", "By": "_bytes", "FLOP/By": "_flop_per_byte", "tokens": "_tokens"}.get(
        series.unit
    )
    assert suffix is None or series.name.endswith(suffix)


def test_series_have_different_names() -> None:
    """Two series of one name would be one series in Prometheus."""
    assert len({series.name for series in ALL_SERIES}) == len(ALL_SERIES)


def test_latency_buckets_hold_those_of_the_genai_conventions() -> None:
    """Every edge of the conventions is an edge of ours, so their dashboards read our histograms."""
    assert set(metrics.REQUEST_DURATION.boundaries) >= SEMCONV_DURATION_S
    assert set(metrics.TTFT.boundaries) >= SEMCONV_TTFT_S
    assert set(metrics.TIME_PER_OUTPUT_TOKEN.boundaries) >= SEMCONV_TIME_PER_OUTPUT_TOKEN_S


def test_counters_add_up_gauges_keep_the_last_and_labels_part_them() -> None:
    """Each combination of labels is a number of its own."""
    meter = MemoryMeter()
    for amount in (1, 2):
        meter.add(metrics.ROUTER_PICKS, amount, {"region": "eu"})
    meter.add(metrics.ROUTER_PICKS, 5, {"region": "us"})
    meter.set(metrics.WAITING, 7, {})
    meter.set(metrics.WAITING, 3, {})
    assert meter.value(metrics.ROUTER_PICKS, region="eu") == 3
    assert meter.value(metrics.ROUTER_PICKS, region="us") == 5
    assert meter.value(metrics.ROUTER_PICKS, region="ap") == 0
    assert meter.value(metrics.WAITING) == 3


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 100, allow_nan=False) | st.sampled_from(metrics.TTFT.boundaries)))
def test_a_histogram_counts_each_value_in_the_first_bucket_that_holds_it(values: list[float]) -> None:
    """Cumulated, the buckets are Prometheus's: how many values were at most the edge."""
    meter, tags = MemoryMeter(), {"model": "m", "region": "eu"}
    for value in values:
        meter.observe(metrics.TTFT, value, tags)
    seen = meter.observed(metrics.TTFT, **tags)
    assert seen.count == len(values)
    assert seen.total == pytest.approx(sum(values))
    for index, edge in enumerate(metrics.TTFT.boundaries):
        assert sum(seen.counts[: index + 1]) == sum(value <= edge for value in values)


def test_a_meter_refuses_a_wrong_kind_wrong_labels_and_a_counter_going_down() -> None:
    """What Ray would take silently, or fail on in production only, fails in a test."""
    meter = MemoryMeter()
    with pytest.raises(AssertionError, match="is a gauge, not a counter"):
        meter.add(metrics.WAITING, 1, {})
    with pytest.raises(AssertionError, match="takes the tags"):
        meter.add(metrics.ROUTER_PICKS, 1, {})
    with pytest.raises(AssertionError, match="takes the tags"):
        meter.set(metrics.WAITING, 1, {"user": "ada"})
    with pytest.raises(AssertionError, match="cannot go down"):
        meter.add(metrics.ROUTER_PICKS, -1, {"region": "eu"})
