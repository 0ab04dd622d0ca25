"""The second cache tier's bookkeeping: what is found there is what was put there, whatever the order."""

import random
from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.block_hash import hash_blocks
from serving.engine.block_pool import BlockPool
from serving.engine.host_tier import HostTier
from serving.messages import BlockRemoved, BlockStored
from tests.serving.engine.harness import ROOT, Harness, request
from tests.serving.engine.test_block_events import Follower
from tests.serving.engine.test_block_pool import cached, name
from tests.serving.engine.test_scheduler_traces import requests, run_any_trace


class Contents:
    """What lies where, by name, told by nothing but the steps' copies and chunks, in their order."""

    def __init__(self):
        self.blocks: dict[int, bytes] = {}
        self.slots: dict[int, bytes] = {}
        self.num_fetched = 0
        self._scheduled = deque()

    def scheduled(self, step):
        """Tables change before the step is over."""
        self._scheduled.append(
            (step.copies, [(chunk, list(chunk.sequence.block_table)) for chunk in step.chunks])
        )

    def take(self):
        """Of the next step in order: every block that a chunk builds upon holds what belongs there."""
        copies, chunks = self._scheduled.popleft()
        spilled = {slot: self.blocks[block] for block, slot in copies.spills.tolist()}
        self.slots |= spilled
        self.blocks |= {block: self.slots[slot] for slot, block in copies.fetches.tolist()}
        self.num_fetched += len(copies.fetches)
        for chunk, table in chunks:
            size = chunk.sequence.block_tokens
            names = hash_blocks(ROOT, tuple(chunk.sequence.token_ids[: chunk.start]), size)
            assert [self.blocks.get(b) for b in table[: len(names)]] == list(names), "it holds something else"
        for chunk, table in chunks:
            size = chunk.sequence.block_tokens
            names = hash_blocks(ROOT, tuple(chunk.sequence.token_ids[: chunk.end]), size)
            for index in range(chunk.start // size, -(-chunk.end // size)):
                self.blocks[table[index]] = names[index] if index < len(names) else b"a part of a block"


class Tiered(Harness):
    """A harness with two tiers that looks at all contents and follows all events."""

    def __post_init__(self):
        super().__post_init__()
        self.contents = Contents()
        self.follower = Follower(self.pool.snapshot())

    def begin(self):
        step = super().begin()
        if step is not None:
            self.contents.scheduled(step)
        self.follow()
        return step

    def end(self):
        self.contents.take()
        super().end()
        self.follow()

    def follow(self):
        batch = self.pool.events.drain()
        assert batch is None or self.follower.take(batch)
        snapshot = self.pool.snapshot()
        assert len(set(snapshot.block_hashes)) == len(snapshot.block_hashes)
        assert self.follower.hashes == set(snapshot.block_hashes)


@st.composite
def tiered(draw):
    poison = draw(st.sampled_from([0, 0, 11]))
    return Tiered(
        num_blocks=draw(st.integers(6, 24)),
        block_tokens=draw(st.integers(1, 5)),
        max_num_seqs=draw(st.integers(1, 5)),
        max_step_tokens=draw(st.integers(1, 24)),
        host_blocks=draw(st.sampled_from([1, 2, 5, 12, 100])),
        foresees=draw(st.booleans()),
        runs_ahead=draw(st.booleans()),
        is_poisoned=lambda tokens: bool(poison) and len(tokens) % poison == 0,
    )


def run_trace(harness, submits, data):
    if harness.is_poisoned((0,) * 11):
        harness.check_outputs = lambda: None  # who meets the poison ends early
    run_any_trace(harness, submits, data)


def test_the_least_recently_used_name_gives_way():
    """A spill takes a free slot, else that of the name which was spilled or fetched longest ago."""
    tier = HostTier(2)
    assert tier.spill(name(1), 5) is None and tier.spill(name(2), 6) is None
    assert tier.take_copies().spills.tolist() == [[5, 0], [6, 1]]
    tier.pin([name(1)])
    tier.fetch(name(1), 9)
    assert tier.take_copies().fetches.tolist() == [[0, 9]]
    assert tier.spill(name(3), 7) == name(2)
    assert list(tier) == [name(1), name(3)]
    assert tier.take_copies().spills.tolist() == [[7, 1]]
    assert tier.spill(name(1), 8) is None, "what is here already"
    assert len(tier.take_copies().spills) == 0
    tier.check_integrity()


def test_a_slot_that_a_fetch_reads_takes_no_spill_of_the_same_step():
    """A step spills first: the content would be overwritten before it is fetched."""
    tier = HostTier(1)
    tier.spill(name(1), 5)
    tier.take_copies()
    tier.pin([name(1)])
    assert tier.spill(name(2), 3) == name(2), "then this one is lost"
    tier.fetch(name(1), 3)
    copies = tier.take_copies()
    assert (copies.spills.tolist(), copies.fetches.tolist()) == ([], [[0, 3]])
    assert tier.spill(name(2), 3) == name(1), "pinned for that step alone"


def test_what_a_step_spills_it_can_fetch():
    """A name evicted and wanted again in the same schedule comes back by way of its slot."""
    pool = BlockPool(2, 4, HostTier(4))
    cached(pool, 1)
    pool.allocate(2)
    assert pool.match([name(1)]) == []
    pool.release([0, 1])
    blocks, num_fetched = pool.bring([name(1)])
    assert num_fetched == 1 and pool.match([name(1)]) == blocks
    copies = pool.take_copies()
    (spilled,), (fetched,) = copies.spills.tolist(), copies.fetches.tolist()
    assert spilled[1] == fetched[0] and fetched[1] == blocks[0]
    pool.check_integrity()


def test_a_prefix_may_lie_in_both_tiers():
    """The longest prefix that both hold together is found, whatever lies where; a gap in both ends it."""
    pool = BlockPool(4, 4, HostTier(4))
    for index in (2, 1, 3, 5):  # the one that is evicted first
        cached(pool, index)
    pool.release(pool.allocate(1))
    assert pool.match([name(1), name(2)]) == pool.match([name(1)])
    blocks, num_fetched = pool.bring([name(1), name(2), name(3), name(4), name(5)])
    assert (len(blocks), num_fetched) == (3, 1)
    assert [pool.num_readers(block) for block in blocks] == [1, 1, 1]
    assert pool.match([name(1), name(2), name(3)]) == blocks
    pool.check_integrity()


def test_events_tell_of_both_tiers_as_one():
    """A name is removed when it leaves the last of them, and is not stored again while one has it."""
    pool = BlockPool(1, 4, HostTier(1))
    cached(pool, 1)
    pool.release(pool.allocate(1))  # 1 is on the host now
    cached(pool, 1)  # computed again: it is in both
    pool.release(pool.allocate(1))
    pool.take_copies()
    assert pool.events.drain().events == (BlockStored(name(1), name(0)),)
    cached(pool, 2)
    pool.release(pool.allocate(1))  # it takes the only slot
    assert pool.events.drain().events == (BlockStored(name(2), name(0)), BlockRemoved(name(1)))
    assert pool.snapshot().block_hashes == (name(2),)


def test_forgotten_content_is_gone_from_host_memory_too():
    """Nobody shall begin with what is not trusted, wherever it lies."""
    pool = BlockPool(1, 4, HostTier(1))
    cached(pool, 1)
    pool.release(pool.allocate(1))
    pool.take_copies()
    blocks, _ = pool.bring([name(1)])
    pool.take_copies()
    pool.forget(blocks)
    pool.release(blocks)
    assert pool.bring([name(1)]) == ([], 0)
    assert pool.events.drain().events[-1] == BlockRemoved(name(1))
    pool.check_integrity()


@settings(max_examples=200, deadline=None)
@given(tiered(), requests(), st.data())
def test_what_is_found_is_what_was_kept(harness, submits, data):
    """On any trace: prefix hits in either tier hold the hit's content when the step computes, outputs are
    those without a cache, and the events tell exactly what is cached somewhere."""
    run_trace(harness, submits, data)


@pytest.mark.full
@settings(max_examples=5_000, deadline=None)
@given(tiered(), requests(), st.data())
def test_the_same_on_five_thousand_traces(harness, submits, data):
    """Slots as few as one, pools as small as a request, poison and aborts included."""
    run_trace(harness, submits, data)


def talk(harness, rng, num_steps):
    """Conversations that go on in random order: each prompt is an earlier text with something more."""
    texts = [tuple(rng.choices(range(50), k=rng.randint(4, 12))) for _ in range(12)]
    while len(harness.steps) < num_steps:
        for _ in range(rng.randint(1, 4)):
            index = rng.randrange(len(texts))
            number = str(len(harness.submits))
            harness.submit(request(number, texts[index], max_tokens=rng.randint(1, 12), seed=index))
            more = tuple(rng.choices(range(50), k=rng.randint(1, 8)))
            texts[index] = texts[index] + more if len(texts[index]) < 80 else texts[index][:4] + more
        for _ in range(rng.randint(1, 12)):
            harness.step()
    harness.run()
    harness.check_outputs()


def check_conversations(host_blocks, num_steps):
    computed = {}
    for blocks in (0, host_blocks):
        harness = (Tiered if blocks else Harness)(48, max_num_seqs=4, host_blocks=blocks, runs_ahead=True)
        talk(harness, random.Random(host_blocks), num_steps)
        computed[blocks] = harness.executor.computed_tokens
        if blocks:
            assert harness.contents.num_fetched > num_steps / 20
    assert computed[host_blocks] < computed[0]


@pytest.mark.parametrize("host_blocks", [6, 40, 400])
def test_conversations_come_back(host_blocks):
    """Twelve conversations in a pool for three: contents are right in every step, and what is found in
    host memory is not computed again."""
    check_conversations(host_blocks, num_steps=400)


@pytest.mark.full
@pytest.mark.parametrize("host_blocks", [6, 40, 400])
def test_ten_thousand_steps_of_conversations(host_blocks):
    """The same, in three long traces."""
    check_conversations(host_blocks, num_steps=3_400)
