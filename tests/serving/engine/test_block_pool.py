import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from serving.engine.block_pool import BlockPool


def name(index: int) -> bytes:
    return index.to_bytes(16, "little")


def cached(pool: BlockPool, *names: int) -> list[int]:
    """Allocate, name and release one block a name; the blocks are then evictable."""
    blocks = pool.allocate(len(names))
    for block, index in zip(blocks, names, strict=True):
        pool.register(block, name(index), name(0))
    pool.release(blocks)
    return blocks


def test_a_released_block_stays_a_hit_until_it_is_allocated_again():
    """Eviction is the free list: content outlives its readers, and dies by reallocation only."""
    pool = BlockPool(2, 4)
    blocks = cached(pool, 1)
    assert pool.match([name(1)]) == blocks
    pool.allocate(1)  # takes the block without a name
    assert pool.match([name(1)]) == blocks
    pool.allocate(1)
    assert pool.match([name(1)]) == []
    pool.check_integrity()


def test_the_least_recently_released_block_is_evicted_first():
    """Order of eviction is order of release; a hit renews."""
    pool = BlockPool(3, 4)
    for index in (1, 2, 3):
        cached(pool, index)
    hit = pool.match([name(1)])
    pool.acquire(hit)
    pool.release(hit)
    evicted = []
    for _ in range(3):
        before = {index for index in (1, 2, 3) if pool.match([name(index)])}
        pool.allocate(1)
        evicted += before - {index for index in (1, 2, 3) if pool.match([name(index)])}
    assert evicted == [2, 3, 1]


def test_a_prefix_outlives_its_continuation():
    """Of one released sequence the tail is evicted first, since a tail without its head is no hit."""
    pool = BlockPool(3, 4)
    blocks = cached(pool, 1, 2, 3)
    pool.allocate(1)
    assert pool.match([name(1), name(2), name(3)]) == blocks[:2]


def test_a_match_ends_at_the_first_gap():
    """A block behind a missing one is not part of the prefix, though it is cached."""
    pool = BlockPool(3, 4)
    blocks = cached(pool, 1, 3)
    assert pool.match([name(1), name(2), name(3)]) == blocks[:1]


def test_forgotten_content_is_never_matched_again():
    """After `forget` the name is gone at once, and the block becomes plainly free when released."""
    pool = BlockPool(1, 4)
    blocks = cached(pool, 1)
    pool.acquire(blocks)
    pool.forget(blocks)
    assert pool.match([name(1)]) == []
    pool.release(blocks)
    assert (pool.num_free, pool.num_evictable) == (1, 0)
    pool.check_integrity()


def test_releasing_more_often_than_held_is_a_bug_that_shows():
    """The pool does not let a block be owned twice later."""
    pool = BlockPool(1, 4)
    blocks = pool.allocate(1)
    pool.release(blocks)
    with pytest.raises(AssertionError):
        pool.release(blocks)


class PoolMachine(RuleBasedStateMachine):
    """Random readers against a plain model: a list of holds, and what each block contains."""

    @initialize(num_blocks=st.integers(1, 6))
    def start(self, num_blocks):
        self.pool = BlockPool(num_blocks, 4)
        self.holds: list[list[int]] = []
        self.content: dict[int, bytes] = {}  # names given, as the model believes them

    @rule(data=st.data())
    def allocate(self, data):
        count = data.draw(st.integers(0, self.pool.num_available))
        blocks = self.pool.allocate(count)
        held = {block for hold in self.holds for block in hold}
        assert not held & set(blocks), "owned twice"
        for block in blocks:
            self.content.pop(block, None)
        self.holds.append(blocks)

    @rule(index=st.integers(0, 4), data=st.data())
    def register(self, index, data):
        unnamed = sorted({b for hold in self.holds for b in hold if b not in self.content})
        if unnamed:
            block = data.draw(st.sampled_from(unnamed))
            self.pool.register(block, name(index), name(0))
            if name(index) not in self.content.values():
                self.content[block] = name(index)

    @rule(names=st.lists(st.integers(0, 4), max_size=3, unique=True))
    def hit(self, names):
        blocks = self.pool.match([name(index) for index in names])
        by_name = {block_name: block for block, block_name in self.content.items()}
        expected = []
        for index in names:
            if name(index) not in by_name:
                break
            expected.append(by_name[name(index)])
        assert blocks == expected
        self.pool.acquire(blocks)
        self.holds.append(blocks)

    @precondition(lambda self: self.holds)
    @rule(data=st.data())
    def release(self, data):
        self.pool.release(self.holds.pop(data.draw(st.integers(0, len(self.holds) - 1))))

    @invariant()
    def counts_agree_with_the_model(self):
        if not hasattr(self, "pool"):
            return
        self.pool.check_integrity()
        readers = [sum(hold.count(block) for hold in self.holds) for block in range(self.pool.num_blocks)]
        assert readers == [self.pool.num_readers(block) for block in range(self.pool.num_blocks)]
        unread = {block for block, count in enumerate(readers) if count == 0}
        assert self.pool.num_evictable == len(unread & self.content.keys())
        assert self.pool.num_free == len(unread - self.content.keys())


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


@pytest.mark.full
class TestTenThousandPools(PoolMachine.TestCase):
    """The same, as long as it takes to be sure."""

    settings = settings(max_examples=10_000, stateful_step_count=30, deadline=None)
