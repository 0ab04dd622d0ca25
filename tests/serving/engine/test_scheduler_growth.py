"""What the scheduler learns of outputs' lengths, against samples whose distribution is known."""

import numpy as np
import pytest

from cluster.load import StepCoefficients
from serving.bench.engine.pressure import simulate
from serving.bench.engine.pressure_replay import LoadShape
from serving.engine.block_pool import BlockPool
from serving.engine.growth import OutputGrowth
from serving.engine.sequence import Sequence
from tests.serving.engine.harness import Harness, request

BLOCK_TOKENS = 4


def sequence_with(outputs, prompt_tokens=4, max_tokens=4000):
    sequence = Sequence.from_submit(
        request("s", tuple(range(prompt_tokens)), max_tokens=max_tokens), BLOCK_TOKENS
    )
    for _ in range(outputs):
        sequence.token_ids.append(1)
    return sequence


def growth_of(num_blocks, prior_tokens=64):
    return OutputGrowth(
        BlockPool(num_blocks, BLOCK_TOKENS), max_context_tokens=4000, prior_tokens=prior_tokens
    )


def most_beside_each_other(growth):
    """How many fresh sequences are let in together, none of which has blocks yet but counts its prompt's."""
    running = []
    pool = growth._pool
    while True:
        head = sequence_with(0)
        if running and not growth.has_room(running, [head]):
            return len(running)
        head.block_table.extend(pool.allocate(1))
        running.append(head)


def test_short_outputs_let_more_in_than_long_ones():
    """The same pool is filled higher the sooner its sequences are known to end."""
    numbers = []
    for length in (4, 40, 160):
        growth = growth_of(400)
        for _ in range(200):
            growth.observe(sequence_with(length), is_whole=True)
        numbers.append(most_beside_each_other(growth))
    assert numbers[0] > numbers[1] > numbers[2]
    assert numbers[2] <= 400 // 40, "each will hold 41 blocks, all at the same time"
    assert numbers[0] >= 90, "two blocks each: 200 would fit, and the doubt about them takes some"


@pytest.mark.parametrize("mean_blocks", [3, 10, 30])
def test_survival_is_learned_from_those_that_ended_and_those_that_go_on(mean_blocks):
    """Censored at random, geometric lengths still give their true hazard, where a plain mean would not."""
    rng = np.random.default_rng(mean_blocks)
    growth = growth_of(10)
    lengths = rng.geometric(1 / mean_blocks, 2000)
    cuts = rng.geometric(1 / (2 * mean_blocks), 2000)
    for length, cut in zip(lengths, cuts, strict=True):
        is_whole = length <= cut
        outputs = (min(length, cut) - 1) * BLOCK_TOKENS + 1 + (0 if is_whole else BLOCK_TOKENS)
        growth.observe(sequence_with(int(outputs)), is_whole)
    survival = growth._survival(np.zeros(0, dtype=int), mean_blocks + 1)
    at = mean_blocks
    assert survival[at] == pytest.approx((1 - 1 / mean_blocks) ** at, abs=0.08)


def test_what_a_request_asks_for_bounds_what_it_is_expected_to_hold():
    """However long outputs usually are, one of a single block of output needs no more."""
    growth = growth_of(12)
    for _ in range(50):
        growth.observe(sequence_with(100), is_whole=True)
    running = sequence_with(0, max_tokens=4)
    running.block_table.extend(growth._pool.allocate(1))
    assert growth.has_room([running], [sequence_with(0, max_tokens=4)])
    assert not growth.has_room([running], [sequence_with(0)])


@pytest.mark.parametrize(("num_blocks", "has_room"), [(80, False), (130, True)])
def test_a_shared_prefix_outlives_each_of_its_readers(num_blocks, has_room):
    """Forty readers hold it once; of those that end, only their own blocks are foreseen to be free."""
    growth = growth_of(num_blocks)
    for length in np.random.default_rng(0).geometric(1 / 4, 600):
        growth.observe(sequence_with(int(length) * BLOCK_TOKENS), is_whole=True)
    pool = growth._pool
    prefix = pool.allocate(16)
    sequences = [sequence_with(0, prompt_tokens=65) for _ in range(41)]
    for index, sequence in enumerate(sequences):
        if index:
            pool.acquire(prefix)
        sequence.block_table.extend(prefix)
    *running, head = sequences
    for sequence in running:
        sequence.block_table.extend(pool.allocate(1))
    assert growth.has_room(running, [head]) is has_room


def test_holds_of_those_further_back_give_way():
    """The first in line is not held back for blocks that one behind it merely pins."""
    growth = growth_of(20, prior_tokens=4)
    running, head, last = sequence_with(0), sequence_with(0), sequence_with(0, prompt_tokens=60)
    running.block_table.extend(growth._pool.allocate(1))
    last.block_table.extend(growth._pool.allocate(14))
    assert growth.has_room([running], [head, last])
    assert not growth.has_room([running, last], [head]), "where it runs, it counts"


def test_who_is_held_back_is_admitted_when_another_ends():
    """Foresight delays, it never refuses: alone, or beside those that leave room, everyone runs."""
    harness = Harness(num_blocks=24, foresees=True)
    for index in range(6):
        harness.submit(request(str(index), tuple(range(index, index + 8)), max_tokens=20))
    harness.run()
    harness.check_outputs()
    assert sum(step.num_preemptions for step in harness.steps) == 0
    assert max(len(step.chunks) for step in harness.steps) > 1


COST = StepCoefficients(base_ms=8.0, per_token_ms=0.45, per_kv_token_ms=0.001)  # of a small model on a CPU


def check_under_pressure(seed, shape):
    """85 % of the throughput of an oracle that knows every length, 5 % computed again, in half the blocks."""
    result = simulate(COST, 0.5, seed=seed, shape=shape)
    assert result.oracle.run.num_preemptions == 0, "what it foresaw is what came"
    assert result.unreserved_of_oracle >= 0.85 and result.unreserved.run.recomputed_share <= 0.05
    needed = result.unconstrained.run.peak_blocks
    for row in (result.oracle, result.ours, result.unreserved):
        assert row.run.peak_blocks <= row.pool_blocks == needed // 2
    return result


def test_half_the_blocks_cost_little():
    """Near an oracle that knows every length, though nobody reserves anything."""
    check_under_pressure(seed=1, shape=LoadShape(num_requests=96, output_log_mean=4.3, max_output_tokens=400))


@pytest.mark.full
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("log_mean", [4.3, 5.0, 5.7], ids=["short", "usual", "long"])
def test_half_the_blocks_cost_little_whatever_length_is_usual(seed, log_mean):
    """Lengths are learned online, from a prior that may be wrong; Ingress's reservations do no harm."""
    assert check_under_pressure(seed, LoadShape(output_log_mean=log_mean)).passes
