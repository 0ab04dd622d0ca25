"""The pool's events tell exactly what is cached, to whoever follows them from a snapshot."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.block_hash import hash_blocks
from serving.engine.block_events import BlockEventLog
from serving.engine.block_pool import BlockPool
from serving.messages import BlockEvents, BlockRemoved, BlockStored, decode, encode
from tests.serving.engine.harness import ROOT, Harness, request
from tests.serving.engine.test_block_pool import cached, name


class Follower:
    """Keeps the set of cached hashes from a snapshot and the batches after it, as a router would."""

    def __init__(self, snapshot):
        self.last_number = snapshot.last_number
        self.hashes = set(snapshot.block_hashes)

    def take(self, batch):
        """False when events are missing; then nothing was taken."""
        if batch.first_number > self.last_number + 1:
            return False
        for number, event in enumerate(batch.events, batch.first_number):
            if number <= self.last_number:
                continue
            self.last_number = number
            if isinstance(event, BlockStored):
                assert event.block_hash not in self.hashes, "stored twice"
                self.hashes.add(event.block_hash)
            else:
                self.hashes.remove(event.block_hash)
        return True


def requests():
    prompts = st.lists(st.integers(0, 1), min_size=1, max_size=20).map(tuple)
    return st.lists(st.tuples(prompts, st.integers(1, 12)), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(requests(), st.integers(8, 20), st.data())
def test_events_after_any_snapshot_give_the_set_of_cached_blocks(shapes, num_blocks, data):
    """Whenever one begins to follow, it knows after every batch exactly what the pool would match."""
    harness = Harness(num_blocks, max_step_tokens=9)
    pool = harness.pool
    followers = [Follower(pool.snapshot())]
    for index, (prompt, max_tokens) in enumerate(shapes):
        poison = data.draw(st.booleans())
        harness.executor._is_poisoned = lambda tokens, poison=poison: poison and len(tokens) % 7 == 0
        harness.submit(request(str(index), prompt, max_tokens=max_tokens, reserve_blocks=0))
        for _ in range(data.draw(st.integers(0, 12))):
            harness.step()
            if data.draw(st.booleans()):
                followers.append(Follower(pool.snapshot()))  # in the middle of a batch
            batch = pool.events.drain()
            cached_now = set(pool.snapshot().block_hashes)
            for follower in followers:
                assert batch is None or follower.take(batch)
                assert follower.hashes == cached_now
                assert follower.last_number == pool.events.last_number
            harness.scheduler.check_integrity()


def test_stored_events_chain_from_the_root():
    """Each names its parent, so that an index can keep them as a tree of prefixes."""
    harness = Harness(num_blocks=16)
    prompt = tuple(range(13))
    harness.submit(request("a", prompt, max_tokens=1))
    harness.run()
    hashes = hash_blocks(ROOT, prompt, 4)
    chain = zip(hashes, (ROOT, *hashes), strict=False)
    assert harness.pool.events.drain().events == tuple(BlockStored(*link) for link in chain)


def test_a_follower_sees_that_it_missed_events():
    """When nobody drains, memory stays bounded; the numbers betray the gap, and a snapshot mends it."""
    pool = BlockPool(8, 4)
    pool.events = BlockEventLog(max_pending=3)
    follower = Follower(pool.snapshot())
    cached(pool, 1, 2, 3, 4)
    batch = pool.events.drain()
    assert len(batch.events) == 3 and not follower.take(batch) and follower.hashes == set()
    follower = Follower(pool.snapshot())
    assert follower.hashes == {name(index) for index in (1, 2, 3, 4)}
    assert follower.take(BlockEvents(first_number=5, events=(BlockRemoved(name(1)),)))
    assert follower.hashes == {name(index) for index in (2, 3, 4)}
    assert pool.events.drain() is None


@pytest.mark.parametrize(
    "event",
    [BlockStored(name(1), name(0)), BlockRemoved(name(1))],
    ids=lambda e: type(e).__name__,
)
def test_events_cross_the_wire_unchanged(event):
    """They decode to themselves, each as its own kind."""
    batch = BlockEvents(first_number=7, events=(event,))
    assert decode(encode(batch), BlockEvents) == batch
