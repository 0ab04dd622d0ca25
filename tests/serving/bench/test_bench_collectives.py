"""Sums over ranks, and what they say of links."""

import pytest

from serving.bench.collectives.measure import bus_bytes_per_s, measure
from serving.bench.collectives.rank import sizes
from serving.errors import SearoomError


def test_links_carry_twice_what_all_but_one_rank_hold():
    """Of 8 ranks each link carries 7/4 of the sum's bytes; of one rank none."""
    assert bus_bytes_per_s(8, 1000, 1e-6) == pytest.approx(1.75e9)
    assert bus_bytes_per_s(1, 1000, 1e-6) == 0


def test_sizes_grow_fourfold():
    """From 1 KiB to 256 MiB."""
    assert list(sizes(256 << 20)) == [1024 * 4**i for i in range(10)]


def test_two_ranks_sum():
    """Processes find one another, and rank 0 tells every size's time once."""
    found = list(measure(2, "cpu", 4096, nominal_bytes_per_s=1e9))
    assert [(one.bytes, one.way) for one in found] == [(1024, "eager"), (4096, "eager")]
    for one in found:
        assert one.crosses_links and one.us > 0
        assert one.bus_bytes_per_s == pytest.approx(one.bytes / (one.us / 1e6))
        assert one.nominal_share == pytest.approx(one.bus_bytes_per_s / 1e9)


def test_a_rank_that_fails_ends_the_measurement():
    """An unknown device is the ranks' own error, told once."""
    with pytest.raises(SearoomError, match="ranks ended with"):
        list(measure(1, "no-such-device", 1024, None))
