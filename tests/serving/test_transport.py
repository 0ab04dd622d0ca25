"""Coalesced calls, streams a pair, and pretend round trips."""

import asyncio
import time

import pytest

from serving.transport import MAX_ITEMS_PER_CALL, Coalescer, DelayLine, Outbox


async def test_an_idle_coalescer_calls_at_once_and_a_busy_one_batches():
    """The first item leaves alone; everything that arrives during its call rides the second."""
    batches = []
    release = asyncio.Event()

    async def call(items):
        batches.append(items)
        await release.wait()
        return [item * 2 for item in items]

    coalescer = Coalescer(call)
    sends = [asyncio.create_task(coalescer.send(n)) for n in range(1)]
    await asyncio.sleep(0.01)
    sends += [asyncio.create_task(coalescer.send(n)) for n in range(1, 10)]
    await asyncio.sleep(0.01)
    release.set()
    assert await asyncio.gather(*sends) == [n * 2 for n in range(10)]
    assert batches == [[0], list(range(1, 10))]


async def test_a_failed_call_fails_its_own_items_only():
    """An error reaches every sender of that call; the next call goes out as if nothing had been."""
    calls = 0

    async def call(items):
        nonlocal calls
        calls += 1
        await asyncio.sleep(0.01)
        if calls == 1:
            raise ConnectionError("gone")
        return items

    coalescer = Coalescer(call)
    first = asyncio.create_task(coalescer.send(1))
    await asyncio.sleep(0)
    second = asyncio.create_task(coalescer.send(2))
    with pytest.raises(ConnectionError):
        await first
    assert await second == 2


async def test_a_sender_that_gives_up_does_not_disturb_the_others():
    """Cancelling one send leaves the call and its other items alone."""

    async def call(items):
        await asyncio.sleep(0.02)
        return items

    coalescer = Coalescer(call)
    leaver = asyncio.create_task(coalescer.send("leaver"))
    stayer = asyncio.create_task(coalescer.send("stayer"))
    await asyncio.sleep(0.005)
    leaver.cancel()
    assert await stayer == "stayer"


async def test_a_call_carries_a_bounded_number_of_items():
    """A thousand waiting items become calls no larger than the bound, and none is lost."""
    sizes = []

    async def call(items):
        sizes.append(len(items))
        await asyncio.sleep(0)
        return items

    coalescer = Coalescer(call)
    count = 2 * MAX_ITEMS_PER_CALL + 10
    assert await asyncio.gather(*(coalescer.send(n) for n in range(count))) == list(range(count))
    assert max(sizes) <= MAX_ITEMS_PER_CALL and sum(sizes) == count


async def test_a_wrong_number_of_replies_is_an_error_for_all():
    """A far side that loses an answer is found out, not waited for."""

    async def call(items):
        return items[:-1]

    coalescer = Coalescer(call)
    with pytest.raises(RuntimeError, match="replies to"):
        await coalescer.send(1)


async def test_an_outbox_keeps_what_was_put_before_its_consumer_came():
    """Nothing said to a consumer is lost; a batch is everything there is, in order."""
    outbox = Outbox()
    for n in range(3):
        outbox.put("a", n)
    outbox.put("b", 99)
    stream = outbox.consume("a")
    assert await anext(stream) == [] and outbox.is_attached("a")
    assert await anext(stream) == [0, 1, 2]
    outbox.put("a", 3)
    outbox.close("a")
    assert [batch async for batch in stream] == [[3]]
    assert not outbox.is_attached("a")
    other = outbox.consume("b")
    assert [await anext(other), await anext(other)] == [[], [99]]


async def test_a_consumer_that_attaches_again_ends_its_older_stream():
    """Two streams never share one consumer's items."""
    outbox = Outbox()
    older = outbox.consume("a")
    outbox.put("a", 1)
    assert [await anext(older), await anext(older)] == [[], [1]]
    waiting = asyncio.create_task(anext(older, None))
    await asyncio.sleep(0)
    newer = outbox.consume("a")
    assert await anext(newer) == []
    assert await waiting is None
    assert outbox.is_attached("a")
    outbox.put("a", 2)
    assert await anext(newer) == [2]


async def test_a_delay_line_delays_each_item_by_half_a_round_trip_and_keeps_order():
    """Ten items sent together arrive together: the line is latency, not bandwidth."""

    async def items():
        for n in range(10):
            yield n

    started = time.monotonic()
    received = [n async for n in DelayLine(rtt_ms=80).carry(items())]
    elapsed = time.monotonic() - started
    assert received == list(range(10))
    assert elapsed >= 0.04


async def test_a_delay_line_raises_what_the_far_side_raised_after_its_items():
    """An error crosses the pretend network too, behind what was sent before it."""

    async def items():
        yield 1
        raise ConnectionError("gone")

    received = []
    with pytest.raises(ConnectionError):
        async for n in DelayLine(rtt_ms=10).carry(items()):
            received.append(n)  # noqa: PERF401 (what came before the error is the point)
    assert received == [1]
