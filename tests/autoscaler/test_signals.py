"""How many replicas are needed: examples by hand, and the laws between demand and answer."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoscaler.signals import Demand, Targets, replicas_needed
from cluster.load import ReplicaLoad, StepCoefficients
from tests.cluster import load_cases


def a_load(**changes: object) -> ReplicaLoad:
    """A 70B model on four H100s, about: 10 ms to read the weights, 14,000 prompt tokens a second."""
    idle = {
        "blocks_total": 26_000,
        "blocks_free": 26_000,
        "step": StepCoefficients(10.0, 0.07, 0.0),
        "max_step_tokens": 8192,
    }
    return load_cases.a_load("r", **{**idle, **changes})


def test_long_idle_contexts_are_sized_by_memory() -> None:
    """31,200 of 52,000 blocks held and 10,400 wanted, at 0.8 of 26,000 a replica: exactly 2."""
    loads = (a_load(blocks_free=10_400), a_load(blocks_free=10_400))
    need = replicas_needed(Demand(loads=loads, queued_blocks=10_400, output_tokens_per_s=10))
    assert (need.n, need.binding) == (2, "kv")
    one_more = replicas_needed(Demand(loads=loads, queued_blocks=10_401, output_tokens_per_s=10))
    assert one_more.n == 3


def test_prefill_is_sized_by_step_time_with_the_cache_nearly_empty() -> None:
    """20,000 prompt tokens/s at (10 + 573.44) ms a step of 8,192 is 1.42 busy replicas; at 0.7, 2.03: 3."""
    need = replicas_needed(Demand(loads=(a_load(blocks_free=25_000),), prompt_tokens_per_s=20_000))
    assert (need.n, need.binding) == (3, "flops")
    assert "2.03" in need.why


def test_decode_is_charged_at_the_batch_that_meets_tpot() -> None:
    """571 sequences take 50 ms a step: 0.0875 ms a token, so 8,000 tokens/s at 0.7 need exactly 1 replica.

    At today's batch of one, the same tokens would ask for 115.
    """
    load = a_load(num_running=1, decode_kv_tokens=1000)
    assert replicas_needed(Demand(loads=(load,), output_tokens_per_s=7_990)).n == 1
    assert replicas_needed(Demand(loads=(load,), output_tokens_per_s=8_010)).n == 2


def test_a_backlog_is_arrivals_spread_over_its_drain() -> None:
    """100,000 tokens to be gone in 10 s ask for what 10,000 tokens/s do, wherever they wait."""
    waiting = Demand(loads=(a_load(prefill_backlog_tokens=40_000),), queued_prompt_tokens=60_000)
    arriving = Demand(loads=(a_load(),), prompt_tokens_per_s=10_000)
    assert replicas_needed(waiting) == replicas_needed(arriving)


def test_nothing_asked_needs_nothing_and_something_asked_of_nobody_needs_one() -> None:
    """Without a report nothing can be sized: one replica is the least that can tell."""
    assert replicas_needed(Demand(loads=(a_load(),))).n == 0
    assert replicas_needed(Demand(loads=())).n == 0
    assert replicas_needed(Demand(loads=(), queued_blocks=1)).n == 1
    assert replicas_needed(Demand(loads=(a_load(draining=True, blocks_free=0),))).n == 0


def test_a_step_that_never_meets_tpot_still_has_an_answer() -> None:
    """With 80 ms of weights to read, 50 ms cannot be met: tokens are charged at a batch of one."""
    slow = a_load(step=StepCoefficients(80.0, 0.1, 0.0))
    need = replicas_needed(Demand(loads=(slow,), output_tokens_per_s=100), Targets(compute_utilisation=1.0))
    assert need.n == pytest.approx(9)  # 100 * 80.1 ms = 8.01 s of steps a second


demands = st.builds(
    Demand,
    loads=st.lists(
        st.builds(
            a_load,
            blocks_free=st.integers(0, 26_000),
            num_running=st.integers(0, 200),
            decode_kv_tokens=st.integers(0, 100_000),
            prefill_backlog_tokens=st.integers(0, 50_000),
        ),
        min_size=1,
        max_size=4,
    ).map(tuple),
    queued_blocks=st.integers(0, 50_000),
    queued_prompt_tokens=st.integers(0, 50_000),
    prompt_tokens_per_s=st.floats(0, 50_000),
    output_tokens_per_s=st.floats(0, 50_000),
)


@given(
    demands,
    st.sampled_from(["queued_blocks", "queued_prompt_tokens", "prompt_tokens_per_s", "output_tokens_per_s"]),
)
@settings(max_examples=150, deadline=None)
def test_more_demand_never_needs_fewer_replicas(demand: Demand, axis: str) -> None:
    """The answer is monotone along each axis of demand."""
    more = replace(demand, **{axis: getattr(demand, axis) + 10_000})
    assert replicas_needed(more).n >= replicas_needed(demand).n


@given(demands)
@settings(max_examples=100, deadline=None)
def test_the_answer_covers_both_demands_and_one_fewer_would_not(demand: Demand) -> None:
    """n replicas hold the blocks within 0.8 and n - 1 would miss memory or step time."""
    need = replicas_needed(demand)
    held = sum(load.blocks_total - load.blocks_free for load in demand.loads) + demand.queued_blocks
    assert held <= need.n * 0.8 * 26_000 + 1
    if need.binding == "kv" and need.n:
        assert held > (need.n - 1) * 0.8 * 26_000 - 1


@given(demands)
@settings(max_examples=100, deadline=None)
def test_fuller_targets_never_need_more(demand: Demand) -> None:
    """Running replicas fuller, slower or with a longer backlog saves replicas or changes nothing."""
    fuller = Targets(kv_utilisation=0.9, compute_utilisation=0.8, backlog_drain_s=20.0, tpot_ms=100.0)
    assert replicas_needed(demand, fuller).n <= replicas_needed(demand).n
