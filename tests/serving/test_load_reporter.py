"""Load reports: the latest one, soon, never a flood, and a sign of life when nothing changes."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from cluster.load import ReplicaLoad
from serving import load_reporter
from serving.errors import ReplicaGone
from serving.load_reporter import BUSY_INTERVAL_S, IDLE_INTERVAL_S, LoadReporter
from serving.messages import decode
from serving.transport import DelayLine
from tests.serving.fleet_fakes import eventually
from tests.serving.routing_cases import a_load


class Listener:
    """A Router that notes each report and when it came; it can be away."""

    def __init__(self) -> None:
        self.reports: list[ReplicaLoad] = []
        self.times: list[float] = []
        self.num_calls = 0
        self.away = False

    async def call(self, method: str, *args: object) -> object:
        assert method == "report"
        self.num_calls += 1
        if self.away:
            raise ReplicaGone("Router")
        (report,) = decode(args[0], list[ReplicaLoad])
        self.reports.append(report)
        self.times.append(time.monotonic())
        return b""


@asynccontextmanager
async def reporting(
    load: ReplicaLoad, listener: Listener, rtt_ms: float = 0.0
) -> AsyncIterator[LoadReporter]:
    reporter = LoadReporter(load, listener, DelayLine(rtt_ms))
    running = asyncio.create_task(reporter.run())
    try:
        yield reporter
    finally:
        assert running.cancel(), "it ended by itself"


async def test_a_burst_of_changes_is_one_report_of_the_last():
    """The first report leaves at once; of a hundred changes within the interval only the last is told."""
    listener = Listener()
    async with reporting(a_load(blocks_free=100), listener) as reporter:
        await eventually(lambda: listener.reports)
        for free in range(99, -1, -1):
            reporter.changed(a_load(blocks_free=free))
        await eventually(lambda: len(listener.reports) == 2)
        await asyncio.sleep(2 * BUSY_INTERVAL_S)
        assert [report.blocks_free for report in listener.reports] == [100, 0]
        assert [report.sequence for report in listener.reports] == [1, 2]
        assert listener.times[1] - listener.times[0] >= 0.9 * BUSY_INTERVAL_S


async def test_an_idle_replica_says_that_it_lives(monkeypatch):
    """Nothing changes, and a report comes each interval with a new number: silence means death."""
    assert IDLE_INTERVAL_S < 3.0  # the Router doubts a replica after 3 s without a report
    monkeypatch.setattr(load_reporter, "IDLE_INTERVAL_S", 0.05)
    listener = Listener()
    async with reporting(a_load(), listener):
        await eventually(lambda: len(listener.reports) >= 3)
        assert [report.sequence for report in listener.reports[:3]] == [1, 2, 3]


async def test_a_router_that_is_away_gets_the_latest_load_when_it_is_back(monkeypatch):
    """Reports go on after a failure, without a storm of calls meanwhile."""
    monkeypatch.setattr(load_reporter, "IDLE_INTERVAL_S", 0.1)
    listener = Listener()
    listener.away = True
    async with reporting(a_load(), listener) as reporter:
        await eventually(lambda: listener.num_calls)
        for free in range(50):
            reporter.changed(a_load(blocks_free=free))
            await asyncio.sleep(0.002)
        assert listener.num_calls <= 3
        listener.away = False
        await eventually(lambda: listener.reports)
        assert listener.reports[0].blocks_free == 49


async def test_a_pretend_round_trip_delays_a_report():
    """A far replica's load is as old as the way it came."""
    listener = Listener()
    started = time.monotonic()
    async with reporting(a_load(), listener, rtt_ms=100.0):
        await eventually(lambda: listener.reports)
        assert listener.times[0] - started >= 0.05
