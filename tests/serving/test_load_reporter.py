"""Load reports: the latest one, soon, never a flood, and a sign of life when nothing changes."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from cluster.load import ReplicaLoad
from serving import load_reporter
from serving.errors import ReplicaGone
from serving.load_reporter import BUSY_INTERVAL_S, IDLE_INTERVAL_S, LoadReporter
from serving.messages import BlockEvents, BlockSnapshot, BlockStored, ReplicaReport, decode, encode
from serving.transport import DelayLine
from tests.serving.fleet_fakes import eventually
from tests.serving.routing_cases import a_load

SNAPSHOT = BlockSnapshot(last_number=7, block_hashes=(b"a", b"b"))


class Listener:
    """A Router that notes each report and when it came; it can be away."""

    def __init__(self) -> None:
        self.reports: list[ReplicaLoad] = []
        self.blocks: list[BlockEvents | BlockSnapshot] = []
        self.is_whole = True
        self.times: list[float] = []
        self.num_calls = 0
        self.away = False

    async def call(self, method: str, *args: object) -> bytes:
        assert method == "report"
        self.num_calls += 1
        if self.away:
            raise ReplicaGone("Router")
        (report,) = decode(args[0], list[ReplicaReport])
        self.reports.append(report.load)
        self.blocks += report.blocks
        self.times.append(time.monotonic())
        return encode(self.is_whole)


@asynccontextmanager
async def reporting(
    load: ReplicaLoad, listener: Listener, rtt_ms: float = 0.0
) -> AsyncIterator[LoadReporter]:
    async def snapshot() -> BlockSnapshot:
        return SNAPSHOT

    reporter = LoadReporter(load, listener, DelayLine(rtt_ms), snapshot)
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


def stored(number: int) -> BlockEvents:
    return BlockEvents(first_number=number, events=(BlockStored(bytes([number]), b"root"),))


async def test_every_event_of_the_cache_is_told_once_and_in_order():
    """Between two reports they are kept; a load that did not change is told with them."""
    listener = Listener()
    async with reporting(a_load(), listener) as reporter:
        for number in range(1, 40):
            reporter.blocks_changed(stored(number))
            await asyncio.sleep(0.003)
        await eventually(lambda: len(listener.blocks) == 39)
        assert [news.first_number for news in listener.blocks] == list(range(1, 40))
        assert listener.num_calls < 10


async def test_a_router_that_missed_events_is_sent_a_snapshot():
    """Its answer says so; what happened since the snapshot follows it."""
    listener = Listener()
    listener.is_whole = False
    async with reporting(a_load(), listener) as reporter:
        reporter.blocks_changed(stored(3))
        await eventually(lambda: listener.blocks)
        reporter.blocks_changed(stored(8))
        listener.is_whole = True
        await eventually(lambda: SNAPSHOT in listener.blocks and stored(8) in listener.blocks)
        await asyncio.sleep(3 * BUSY_INTERVAL_S)
        assert listener.blocks.count(SNAPSHOT) <= 2


async def test_after_the_router_was_away_a_snapshot_makes_up_for_what_was_lost(monkeypatch):
    """The events of a call that failed are gone with it."""
    monkeypatch.setattr(load_reporter, "IDLE_INTERVAL_S", 0.05)
    listener = Listener()
    listener.away = True
    async with reporting(a_load(), listener) as reporter:
        reporter.blocks_changed(stored(1))
        await eventually(lambda: listener.num_calls)
        listener.away = False
        await eventually(lambda: SNAPSHOT in listener.blocks)
