"""Each peer's rule, by the cases its project describes."""

import msgspec
import pytest

from serving.bench.router.baseline_affinity import (
    RayPrefix,
    SglangCacheAware,
    SglangSmallestTree,
    Smg,
    VllmRouter,
)
from serving.bench.router.baseline_regions import SkyWalker
from serving.bench.router.baseline_scores import Dynamo, LeastKv, LlmD, LMetric, PowerOfTwo, RoundRobin
from serving.bench.router.baseline_views import Asked, Candidate
from tests.serving.routing_cases import BLOCK_TOKENS, a_load


def fleet(count=3, **reported):
    """Candidates A, B, C, ...; each value of `reported` is a list of one figure a replica."""
    candidates = []
    for row in range(count):
        figures = {name: values[row] for name, values in reported.items()}
        load = a_load("ABCDEFGH"[row], region="here", **figures)
        candidates.append(Candidate("ABCDEFGH"[row], "here", row, load=load))
    return candidates


def asked(name, blocks=10):
    """A prompt of so many full blocks; prompts with names of the same beginnings share blocks."""
    units = tuple(f"{name[: i + 1]}{max(0, i + 1 - len(name))}".encode() for i in range(blocks))
    tokens = blocks * BLOCK_TOKENS
    return Asked(name, units, BLOCK_TOKENS, tokens, tokens)


def prompt(text):
    return Asked(text, text, grain=1, size=len(text), prompt_tokens=len(text))


def names(candidates):
    return [candidate.name for candidate in candidates]


def joined(rule, candidates):
    for candidate in candidates:
        rule.joined(candidate.name)
    return rule


def send(rule, text, candidate):
    rule.routed(prompt(text), candidate, 0.0)


def test_round_robin_takes_turns():
    rule, candidates = RoundRobin(), fleet(3)
    picks = []
    for _ in range(5):
        (chosen,) = rule.choose(asked("a"), candidates, 0.0)
        rule.routed(asked("a"), chosen, 0.0)
        picks.append(chosen.name)
    assert picks == ["A", "B", "C", "A", "B"]


def test_power_of_two_takes_the_shorter_queue_of_the_two_it_draws():
    """Never the longest of three, and of the others each sometimes; newer sends count."""
    rule, candidates = PowerOfTwo(seed=1), fleet(3, num_running=[1, 5, 3])
    candidates[0].unreported = {"x": 1, "y": 1, "z": 1}  # 4 there
    picks = {names(rule.choose(asked("a"), candidates, 0.0))[0] for _ in range(50)}
    assert picks == {"A", "C"}


def test_least_kv_reads_the_reported_usage_and_nothing_else():
    """Cached blocks without a reader count as free; so does all that was sent since."""
    candidates = fleet(3, blocks_free=[10, 0, 30], blocks_evictable=[50, 70, 30])
    candidates[1].in_flight = 99
    assert names(LeastKv().choose(asked("a"), candidates, 0.0)) == ["B"]


@pytest.mark.parametrize(("longest", "expected"), [(10, "B"), (11, None)])
def test_ray_goes_to_the_holder_unless_queues_are_over_ten_apart(longest, expected):
    candidates = fleet(3, num_running=[longest, longest, 0])
    rule = joined(RayPrefix(seed=0), candidates)
    send(rule, "x" * 100, candidates[1])
    picks = {names(rule.choose(prompt("x" * 100), candidates, 0.0))[0] for _ in range(40)}
    assert picks == {expected} if expected else "C" in picks


def test_ray_takes_the_holder_with_the_shorter_queue():
    candidates = fleet(3, num_running=[3, 2, 0])
    rule = joined(RayPrefix(seed=0), candidates)
    for holder in candidates[:2]:
        send(rule, "x" * 100, holder)
    assert names(rule.choose(prompt("x" * 100), candidates, 0.0)) == ["B"]


@pytest.mark.parametrize(("shared", "expected"), [(10, ["A"]), (9, ["C"])])
def test_ray_wants_a_tenth_of_the_prompt(shared, expected):
    """Below that, whoever was sent least."""
    candidates = fleet(3)
    rule = joined(RayPrefix(seed=0), candidates)
    send(rule, "x" * 50, candidates[0])
    send(rule, "y" * 60, candidates[1])
    assert names(rule.choose(prompt("x" * shared + "z" * (100 - shared)), candidates, 0.0)) == expected


@pytest.mark.parametrize("make", [SglangCacheAware, SglangSmallestTree, VllmRouter])
@pytest.mark.parametrize(
    ("loads", "expected"), [((65, 0, 1), ["B"]), ((64, 0, 1), ["A"]), ((200, 136, 135), ["A"])]
)
def test_sglangs_family_leaves_the_holder_when_loads_are_far_apart(make, loads, expected):
    """More than 64 apart and more than 1.5 times: one alone is not enough."""
    candidates = fleet(3)
    rule = joined(make(), candidates)
    send(rule, "x" * 100, candidates[0])
    for candidate, load in zip(candidates, loads, strict=True):
        candidate.in_flight = load
    assert names(rule.choose(prompt("x" * 100), candidates, 0.0)) == expected


@pytest.mark.parametrize(
    ("make", "expected"),
    [(SglangCacheAware, ["B", "C"]), (VllmRouter, ["B", "C"]), (SglangSmallestTree, ["A"])],
)
def test_where_a_miss_goes(make, expected):
    """0.3 of the prompt is not more than 0.3."""
    candidates = fleet(3)
    rule = joined(make(), candidates)
    send(rule, "x" * 30, candidates[0])
    send(rule, "y" * 40, candidates[1])
    send(rule, "z" * 40, candidates[2])
    candidates[0].in_flight = 5
    assert names(rule.choose(prompt("x" * 30 + "w" * 70), candidates, 0.0)) == expected
    assert names(rule.choose(prompt("x" * 30 + "w" * 69), candidates, 0.0)) == ["A"]


@pytest.mark.parametrize(("make", "expected"), [(SglangCacheAware, ["C"]), (VllmRouter, ["A"]), (Smg, ["A"])])
def test_which_holder_is_chosen(make, expected):
    """SGLang's the first that was sent it, its heirs the least busy."""
    candidates = fleet(3)
    rule = joined(make(), candidates)
    send(rule, "x" * 100, candidates[2])
    send(rule, "x" * 100, candidates[0])
    candidates[2].in_flight = 2
    for candidate in candidates:
        candidate.load = None
    assert names(rule.choose(prompt("x" * 100), candidates, 0.0)) == expected


@pytest.mark.parametrize(
    ("loads", "expected"), [((9, 2, 3, 4), ["A"]), ((11, 2, 3, 4), ["B"]), ((300, 236, 235, 237), ["A"])]
)
def test_smg_spills_from_a_hot_holder_only(loads, expected):
    """Mean 4.5: hot is over 6.75 and over 4.5 + ceil(2 sqrt(4.5)) = 9.5; with mean 5, over 10."""
    candidates = fleet(4)
    rule = joined(Smg(), candidates)
    send(rule, "x" * 100, candidates[0])
    for candidate, load in zip(candidates, loads, strict=True):
        candidate.in_flight, candidate.load = load, None
    assert names(rule.choose(prompt("x" * 100), candidates, 0.0)) == expected


def test_smg_waits_least_by_what_it_polled_and_sent_since():
    """4,000 queued tokens are 2 s; a KV cache of which 0.75 is in use, 0.45 s; sends count at once."""
    candidates = fleet(3, prefill_backlog_tokens=[4000, 0, 800], blocks_free=[100, 25, 100])
    rule = joined(Smg(), candidates)
    assert names(rule.choose(asked("a"), candidates, 0.0)) == ["C"]
    for _ in range(4):
        rule.routed(asked("a", blocks=10), candidates[2], 0.0)
    assert names(rule.choose(asked("b"), candidates, 5.0)) == ["B"]
    candidates[1].load = msgspec.structs.replace(candidates[1].load, prefill_backlog_tokens=9000)
    assert names(rule.choose(asked("b"), candidates, 9.9)) == ["B"]  # polled every 10 s
    assert names(rule.choose(asked("b"), candidates, 10.0)) == ["C"]


def test_smg_leaves_out_who_is_overloaded_while_another_is_not():
    candidates = fleet(3, num_waiting=[8, 0, 0], blocks_free=[100, 15, 50])
    rule = joined(Smg(), candidates)
    rule.routed(asked("a"), candidates[0], 0.0)
    assert names(rule.choose(asked("a"), candidates, 0.0)) == ["C"]
    assert names(rule.choose(asked("a"), candidates[:1], 0.0)) == ["A"]


def test_llmd_sums_three_for_the_prefix_two_for_the_queue_two_for_kv():
    """Half a match is 1.5, the shortest queue 2, a tenth of the KV cache 0.2."""
    rule = LlmD()
    candidates = fleet(2)
    rule.routed(asked("aaaaabbbbb"), candidates[0], 0.0)
    half = asked("aaaaaccccc")
    assert names(rule.choose(half, candidates, 0.0)) == ["A"]
    assert names(rule.choose(half, fleet(2, num_waiting=[1, 0]), 0.0)) == ["B"]
    assert names(rule.choose(half, fleet(2, blocks_free=[26, 100]), 0.0)) == ["A"]
    assert names(rule.choose(half, fleet(2, blocks_free=[24, 100]), 0.0)) == ["B"]
    assert names(rule.choose(asked("z"), fleet(2), 0.0)) == ["A", "B"]


def test_llmd_remembers_as_much_as_the_pod_caches():
    rule, candidates = LlmD(), fleet(2, blocks_total=[10, 10], blocks_free=[10, 10])
    rule.routed(asked("a"), candidates[0], 0.0)
    rule.routed(asked("b"), candidates[0], 0.0)
    assert names(rule.choose(asked("a"), candidates, 0.0)) == ["A", "B"]
    assert names(rule.choose(asked("b"), candidates, 0.0)) == ["A"]


def test_dynamo_adds_prefill_and_active_blocks_and_credits_the_overlap():
    """A: 10 + 0 backlog - 8 matched + 7 active + 10 new = 19; B: 10 + 4 backlog + 0 active + 10 new = 24."""
    candidates = fleet(2, prefill_backlog_tokens=[0, 4 * BLOCK_TOKENS])
    candidates[0].matched_blocks = 8
    candidates[0].active = {bytes([n]): 1 for n in range(7)}
    assert names(Dynamo().choose(asked("a"), candidates, 0.0)) == ["A"]
    candidates[0].active |= {bytes([n]): 1 for n in range(7, 12)}
    assert names(Dynamo().choose(asked("a"), candidates, 0.0)) == ["A", "B"]
    candidates[0].active |= {b"more": 1}
    assert names(Dynamo().choose(asked("a"), candidates, 0.0)) == ["B"]


def test_dynamo_counts_no_active_block_twice():
    """Of a prompt that runs there already, nothing is new."""
    candidates = fleet(2)
    candidates[0].active = dict.fromkeys(asked("a").units, 1)
    assert names(Dynamo().choose(asked("a"), candidates, 0.0)) == ["A", "B"]
    candidates[1].active = {b"x": 1}
    assert names(Dynamo().choose(asked("a"), candidates, 0.0)) == ["A"]


def test_lmetric_multiplies_what_is_to_prefill_by_the_batch():
    """160 tokens, half of them cached at A: 80 * (1 + 1) = 160 * (0 + 1), so they are even."""
    candidates = fleet(2, num_running=[1, 0])
    candidates[0].matched_blocks = 5
    assert names(LMetric().choose(asked("a"), candidates, 0.0)) == ["A", "B"]
    candidates[0].matched_blocks = 6
    assert names(LMetric().choose(asked("a"), candidates, 0.0)) == ["A"]
    candidates[0].unreported = {"x": 40}
    assert names(LMetric().choose(asked("a"), candidates, 0.0)) == ["B"]


def regions(waiting):
    candidates = fleet(4, num_waiting=waiting)
    for candidate, region in zip(candidates, ("here", "here", "near", "far"), strict=True):
        candidate.region = region
    return candidates


def test_skywalker_pushes_only_where_nothing_waits():
    rule, candidates = SkyWalker("here"), regions([1, 0, 0, 0])
    joined(rule, candidates)
    rule.routed(asked("a"), candidates[0], 0.0)
    assert names(rule.choose(asked("a"), candidates, 0.0)) == ["B"]


def test_skywalker_forwards_to_a_peer_region_when_all_its_replicas_have_a_queue():
    """To the one that was sent over half of the prompt before; without one, the less busy."""
    rule, candidates = SkyWalker("here"), regions([1, 1, 0, 0])
    joined(rule, candidates)
    candidates[2].in_flight = 3
    assert names(rule.choose(asked("a"), candidates, 0.0)) == ["D"]
    rule.routed(asked("a"), candidates[2], 0.0)
    assert names(rule.choose(asked("a"), candidates, 0.0)) == ["C"]


def test_skywalker_lets_it_wait_when_every_replica_has_a_queue():
    rule, candidates = SkyWalker("here"), regions([1, 2, 3, 4])
    assert rule.choose(asked("a"), candidates, 0.0) == []


def test_skywalker_wants_over_half_of_the_prompt():
    rule, candidates = SkyWalker("here"), regions([0, 0, 0, 0])
    joined(rule, candidates)
    rule.routed(prompt("x" * 50), candidates[0], 0.0)
    candidates[0].in_flight = 1
    assert names(rule.choose(prompt("x" * 50 + "y" * 49), candidates, 0.0)) == ["A"]
    assert names(rule.choose(prompt("x" * 50 + "y" * 50), candidates, 0.0)) == ["B"]
