"""The clusters the end-to-end tests share; one at a time, because a laptop has few cores."""

import signal

import pytest
from clusters import start, stop


@pytest.fixture(scope="module")
def one_region(tmp_path_factory):
    """The embedded default: one region, one replica; a pool small enough to be filled."""
    up = start(tmp_path_factory.mktemp("one"), "--kv-blocks", "160", "--dtype", "float32")
    yield up
    assert stop(up) == [], "processes are left after Ctrl-C"


@pytest.fixture(scope="module")
def two_regions(tmp_path_factory):
    """Two pretend regions with a replica each."""
    up = start(tmp_path_factory.mktemp("two"), "--regions", "us-east,eu-west", "--kv-blocks", "200")
    yield up
    assert stop(up, signal.SIGTERM) == [], "processes are left after SIGTERM"
