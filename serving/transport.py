"""How messages cross processes: as much as there is in each call, and never a timer.

`Coalescer`   towards one target at most one call is in flight; what arrives meanwhile rides the next
`Outbox`      what a server has to say to each consumer, on the one stream that consumer keeps open
`DelayLine`   a pretend round trip: delivers in order, each item half a round trip late

None of them knows Ray: they take callables and give iterators.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextvars import Context
from typing import Generic, TypeVar

Item = TypeVar("Item")
Reply = TypeVar("Reply")

MAX_ITEMS_PER_CALL = 512


class Coalescer(Generic[Item, Reply]):
    """Turns many small sends into few calls: an idle system adds no delay, a busy one amortises.

    `call` takes a list of items and answers one reply an item, in order. Its failure fails every
    item of that call, and no other.
    """

    def __init__(self, call: Callable[[list[Item]], Awaitable[Sequence[Reply]]]) -> None:
        self._call = call
        self._waiting: deque[tuple[Item, asyncio.Future[Reply] | None]] = deque()
        self._pump: asyncio.Task[None] | None = None

    async def send(self, item: Item) -> Reply:
        """The reply to `item`. Raises what the call that carried it raised."""
        future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._put(item, future)
        return await future

    def post(self, item: Item) -> None:
        """Send `item`, whatever becomes of it."""
        self._put(item, None)

    def _put(self, item: Item, future: asyncio.Future[Reply] | None) -> None:
        self._waiting.append((item, future))
        if self._pump is None:
            # In no request's context: Serve cancels every call made in the context of a request whose
            # client goes away, and a coalesced call carries other clients' messages too.
            self._pump = asyncio.create_task(self._run(), context=Context())

    async def _run(self) -> None:
        try:
            while self._waiting:
                count = min(len(self._waiting), MAX_ITEMS_PER_CALL)
                await self._send_batch([self._waiting.popleft() for _ in range(count)])
        finally:
            self._pump = None

    async def _send_batch(self, batch: list[tuple[Item, asyncio.Future[Reply] | None]]) -> None:
        # Gathered as a value, so that one failed call fails its own items and cannot end the pump.
        (outcome,) = await asyncio.gather(self._call([item for item, _ in batch]), return_exceptions=True)
        if not isinstance(outcome, BaseException) and len(outcome) != len(batch):
            outcome = RuntimeError(f"{len(outcome)} replies to {len(batch)} messages")
        for index, (_, future) in enumerate(batch):
            if future is None or future.done():  # its sender does not wait, or has given up
                continue
            if isinstance(outcome, BaseException):
                future.set_exception(outcome)
            else:
                future.set_result(outcome[index])


class Stream(Generic[Item]):
    """An unbounded queue one consumer drains as lists: everything there is, at once."""

    def __init__(self) -> None:
        self._items: list[Item] = []
        self._ready = asyncio.Event()
        self._closed = False

    def put(self, item: Item) -> None:
        self._items.append(item)
        self._ready.set()

    def close(self) -> None:
        """What was put is still delivered; then the stream ends."""
        self._closed = True
        self._ready.set()

    async def batches(self) -> AsyncIterator[list[Item]]:
        while True:
            await self._ready.wait()
            self._ready.clear()
            if self._items:
                batch, self._items = self._items, []
                yield batch
            if self._closed and not self._items:
                return


class Outbox(Generic[Item]):
    """One `Stream` a consumer. What is put before a consumer attaches waits for it.

    A consumer that attaches again takes over from its older stream, which ends.
    """

    def __init__(self) -> None:
        self._streams: dict[str, Stream[Item]] = {}
        self._attached: dict[str, Stream[Item]] = {}

    def put(self, consumer_id: str, item: Item) -> None:
        self._stream(consumer_id).put(item)

    def close(self, consumer_id: str) -> None:
        if stream := self._streams.get(consumer_id):
            stream.close()

    def close_all(self) -> None:
        for stream in self._streams.values():
            stream.close()

    async def consume(self, consumer_id: str) -> AsyncIterator[list[Item]]:
        """Batches for this consumer until its stream is closed. The first is empty: it is attached now.

        The caller sees the end in `finally`.
        """
        if older := self._attached.pop(consumer_id, None):
            older.close()
            self._streams[consumer_id] = Stream()
        stream = self._attached[consumer_id] = self._stream(consumer_id)
        try:
            yield []
            async for batch in stream.batches():
                yield batch
        finally:
            if self._attached.get(consumer_id) is stream:
                del self._attached[consumer_id]
                self._streams.pop(consumer_id, None)

    def is_attached(self, consumer_id: str) -> bool:
        return consumer_id in self._attached

    def _stream(self, consumer_id: str) -> Stream[Item]:
        return self._streams.setdefault(consumer_id, Stream())


class DelayLine:
    """The pretend network between two regions: one way takes half a round trip, order is kept."""

    def __init__(self, rtt_ms: float) -> None:
        self._one_way_s = rtt_ms / 2000

    async def cross(self) -> None:
        """Wait for one way across."""
        if self._one_way_s:
            await asyncio.sleep(self._one_way_s)

    async def carry(self, items: AsyncIterator[Item]) -> AsyncIterator[Item]:
        """Every item of `items`, each one way late, without holding up those behind it."""
        if not self._one_way_s:
            async for item in items:
                yield item
            return
        loop = asyncio.get_running_loop()
        arrivals: asyncio.Queue[tuple[float, list[Item]]] = asyncio.Queue()

        async def receive() -> None:
            try:
                async for item in items:
                    arrivals.put_nowait((loop.time() + self._one_way_s, [item]))
            finally:
                arrivals.put_nowait((loop.time() + self._one_way_s, []))  # the end

        receiver = asyncio.create_task(receive())
        try:
            while True:
                due, arrived = await arrivals.get()
                await asyncio.sleep(due - loop.time())
                if not arrived:
                    await receiver  # raises what the far side raised
                    return
                yield arrived[0]
        finally:
            receiver.cancel()
