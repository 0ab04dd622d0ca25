"""What remains of a request: numbers that add up, one line, and nothing it said."""

import asyncio
import logging
from collections.abc import Mapping

import pytest

from serving import metrics
from serving.errors import ApiError, DeadlineExceeded
from serving.metrics import MemoryMeter
from serving.request_log import RequestLog
from serving.tracing import RequestTimes
from tests.serving.fleet_fakes import FakeFleet, FakeReplica, eventually
from tests.serving.generation_cases import reply_of

US = {"model": "m", "region": "us-east"}
NOWHERE = {"model": "m", "region": "none"}


class Trace:
    """Its own tracer: remembers how each request was finished."""

    traceparent = None

    def __init__(self) -> None:
        self.finished: list[tuple[RequestTimes, Mapping[str, object], str | None]] = []

    def begin(self, traceparent: str | None) -> "Trace":
        return self

    def finish(self, times: RequestTimes, attributes: Mapping, error: str | None = None) -> None:
        self.finished.append((times, attributes, error))

    def close(self) -> None:
        pass


async def test_a_served_request_is_counted_traced_and_logged_once(caplog):
    """Tokens, times and outcome under its region; no token id or tenant in line or span."""
    a, meter, trace = FakeReplica("a"), MemoryMeter(), Trace()
    log = RequestLog("m", meter, trace)
    async with FakeFleet(a) as fleet:
        reply = reply_of(fleet.completions(), prompt_tokens=20)

        async def read() -> None:
            async for _ in reply.text():
                pass

        answer = asyncio.create_task(read())
        await eventually(lambda: a.running)
        a.say("q", 77777)
        await asyncio.sleep(0.02)
        a.say("q", 77777, 77777, finish="length")
        await answer
        with caplog.at_level(logging.INFO, "serving.request_log"):
            log.ended(reply, log.begin(None), None)
    assert meter.value(metrics.REQUESTS, outcome="length", **US) == 1
    assert meter.value(metrics.PROMPT_TOKENS, **US) == 20
    assert meter.value(metrics.OUTPUT_TOKENS, **US) == 3
    ttft, duration = meter.observed(metrics.TTFT, **US), meter.observed(metrics.REQUEST_DURATION, **US)
    per_token = meter.observed(metrics.TIME_PER_OUTPUT_TOKEN, **US)
    assert ttft.count == duration.count == per_token.count == 1
    assert ttft.total + 2 * per_token.total == pytest.approx(duration.total)
    ((times, attributes, error),) = trace.finished
    assert times.started_s <= times.picked_s <= times.accepted_s <= times.ended_s and error is None
    assert attributes["gen_ai.usage.output_tokens"] == 3 and attributes["searoom.region"] == "us-east"
    (record,) = caplog.records
    assert (record.outcome, record.replica, record.refusals) == ("length", "a", 0)  # type: ignore[attr-defined]
    assert "77777" not in str(vars(record)) + str(attributes) and "a-tenant" not in str(vars(record))


async def test_a_request_no_replica_took_is_counted_without_one():
    """Its region is "none", its outcome the error's code, and it has no time to first token."""
    meter, trace = MemoryMeter(), Trace()
    log = RequestLog("m", meter, trace)
    async with FakeFleet() as fleet:
        reply = reply_of(fleet.completions(timeout_s=0.02))
        error: ApiError | None = None
        try:
            async for _ in reply.text():
                pass
        except DeadlineExceeded as failed:
            error = failed
        assert error is not None
        log.ended(reply, log.begin(None), error)
    assert meter.value(metrics.REQUESTS, outcome="deadline_exceeded", **NOWHERE) == 1
    assert meter.value(metrics.OUTPUT_TOKENS, **NOWHERE) == 0
    assert meter.observed(metrics.TTFT, **NOWHERE).count == 0
    assert meter.observed(metrics.REQUEST_DURATION, **NOWHERE).count == 1
    assert trace.finished[0][2] == "deadline_exceeded"


async def test_one_token_has_no_time_between_tokens():
    """The mean over no interval is no number, so it is not observed."""
    a, meter = FakeReplica("a"), MemoryMeter()
    log = RequestLog("m", meter, Trace())
    async with FakeFleet(a) as fleet:
        reply = reply_of(fleet.completions())

        async def read() -> None:
            async for _ in reply.text():
                pass

        answer = asyncio.create_task(read())
        await eventually(lambda: a.running)
        a.say("q", 1, finish="stop")
        await answer
        log.ended(reply, log.begin(None), None)
    assert meter.observed(metrics.TTFT, **US).count == 1
    assert meter.observed(metrics.TIME_PER_OUTPUT_TOKEN, **US).count == 0
