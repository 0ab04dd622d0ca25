"""The pooled caches, the omniscient router, and the figures made of runs."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.load import StepCoefficients
from serving.bench.router.figures import (
    jain,
    max_min_grants,
    max_over_mean,
    percentile,
    time_mean_cov,
)
from serving.bench.router.foresight import Decode, Outlook, Prefill, first_token_ms
from serving.bench.router.generated import GeneratorPlan, generate
from serving.bench.router.omniscient import OmniscientRouter
from serving.bench.router.oracles import belady, pooled_lru
from serving.bench.router.reference_fleet import BLOCK_TOKENS, fleet
from serving.simulator import SimRequest, simulate


def asking(number, text):
    """A request for a prompt of one block a letter, and one token more, so that all may match."""
    names = tuple(text[: end + 1].encode() for end in range(len(text)))
    return SimRequest(number, 0.0, "local", "t", 0, len(text) * 4 + 1, 1, 16, names)


def asked(*texts):
    return [asking(number, text) for number, text in enumerate(texts)]


def most_hits(requests, num_blocks):
    """By trying every prefix-closed set that could be kept after each request."""

    def best(index, kept):
        if index == len(requests):
            return 0
        names = requests[index].block_hashes
        hits = len(list(itertools.takewhile(lambda name: name in kept, names)))
        there = kept | set(names)
        options = [
            set(chosen)
            for size in range(min(num_blocks, len(there)) + 1)
            for chosen in itertools.combinations(sorted(there), size)
        ]
        return hits + max(best(index + 1, frozenset(option)) for option in options)

    return best(0, frozenset())


def test_lru_keeps_what_was_used_last():
    """Of two blocks' room, the older prompt's goes; of a prompt the deepest block goes first."""
    assert pooled_lru(asked("ab", "cd", "ab"), 2, 4).by_request == (0, 0, 0)
    assert pooled_lru(asked("ab", "c", "ab"), 2, 4).by_request == (0, 0, 1)
    assert pooled_lru(asked("ab", "abc", "abcd"), 4, 4).by_request == (0, 2, 3)
    assert pooled_lru(asked("ab", "abc", "abcd"), 4, 4).share == 5 / 9


def test_the_block_of_the_last_token_is_computed_anyway():
    request = replace(asking(0, "ab"), prompt_tokens=8)
    assert pooled_lru([request, request], 8, 4).by_request == (0, 1)


def test_a_reply_that_is_repeated_hits():
    first = replace(asking(0, "a"), output_hashes=(b"ab",))
    assert pooled_lru([first, asking(1, "abc")], 8, 4).by_request == (0, 2)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.text(alphabet="ab", min_size=1, max_size=2), min_size=1, max_size=4),
    st.integers(min_value=1, max_value=3),
)
def test_belady_hits_the_most_there_is(texts, num_blocks):
    """As many as the best of all that could be kept, and LRU no more."""
    requests = asked(*texts)
    most = sum(belady(requests, num_blocks, 4).by_request)
    assert most == most_hits(requests, num_blocks)
    assert sum(pooled_lru(requests, num_blocks, 4).by_request) <= most


STEP = StepCoefficients(10.0, 0.1, 0.001, 0.0, 0.0)


def outlook(**facts):
    return Outlook(**{
        "step": STEP, "block_tokens": 16, "max_step_tokens": 100, "max_num_seqs": 8, "available_blocks": 100,
    } | facts)  # fmt: skip


def test_an_idle_replica_takes_a_prompts_own_chunks():
    """Two steps of 100 and 50 tokens, counted by hand."""
    ms = first_token_ms(outlook(), Prefill(0, 150, 1, 10, 10))
    assert ms == pytest.approx((10 + 10 + 0.1) + (10 + 5 + 0.15))


def test_who_waits_for_blocks_waits_for_the_true_end_of_a_decode():
    """The decode has 3 tokens left: three steps of it alone, then the prefill, since then there is room."""
    busy = outlook(available_blocks=0, decodes=[Decode(3, 32, 3)])
    ms = first_token_ms(busy, Prefill(0, 16, 1, 1, 1))
    alone = sum(10 + 0.1 + 0.001 * tokens for tokens in (32, 33, 34))
    assert ms == pytest.approx(alone + 10 + 1.6 + 0.016)
    assert first_token_ms(outlook(available_blocks=0), Prefill(0, 16, 1, 1, 1)) == math.inf
    assert first_token_ms(busy, Prefill(0, 16, 1, 1, 1), limit_ms=20.0) == math.inf


def test_what_the_omniscient_router_foresees_comes_true():
    """Matches are as foreseen; so are first tokens, but where a later prompt fills up the same step."""
    setup = fleet(3, ("local",), kv_tokens=2_000_000)
    workload = generate(GeneratorPlan(num_requests=120, span_s=60.0, lead_s=60.0), BLOCK_TOKENS, 0)
    routes = {}

    class Watched(OmniscientRouter):
        def request(self, request, now):
            route = routes[int(request.request_id)] = super().request(request, now)
            return route

    result = simulate(setup, workload.requests, Watched)
    num_alone = 0
    for request in workload.requests:
        route, number = routes[request.number], request.number
        assert result.cached_tokens[number] == route.matched_blocks * BLOCK_TOKENS
        late_ms = result.ttft_s[number] * 1e3 - route.predicted_ms
        assert late_ms >= setup.router_hop_ms / 2 - 0.05
        first_s = request.arrival_s + result.ttft_s[number]
        later = [r for r in workload.requests[number + 1 :] if r.arrival_s < first_s]
        if all(routes[other.number].replica_id != route.replica_id for other in later):
            assert late_ms == pytest.approx(setup.router_hop_ms / 2, abs=0.05)
            num_alone += 1
    assert num_alone > 60


def test_whoever_is_refused_waits_for_ever():
    values = np.array([1.0, 2.0, 3.0, np.nan])
    done = np.array([True, True, True, False])
    assert percentile(values, done, 50) == 2.0
    assert percentile(values, done, 75) == 3.0
    assert percentile(values, done, 76) == math.inf


def test_balance_figures():
    assert max_over_mean(np.array([3, 1, 2])) == 1.5
    even, uneven = np.full((3, 4), 0.5), np.tile([0.2, 0.6], (3, 1))
    assert time_mean_cov(even) == 0 and time_mean_cov(uneven) == pytest.approx(0.5)
    assert time_mean_cov(np.zeros((3, 4))) is None


def test_fairness_counts_what_was_granted_not_what_was_asked():
    """Who asks for little gets it all; the rest is split evenly, whatever more was asked for."""
    assert max_min_grants(np.array([100.0, 1.0, 30.0]), 41.0).tolist() == [20.0, 1.0, 20.0]
    assert max_min_grants(np.array([1.0, 2.0]), 9.0).tolist() == [1.0, 2.0]
    assert jain(np.array([1.0, 1.0])) == 1.0
    assert jain(np.array([1.0, 0.0])) == 0.5
