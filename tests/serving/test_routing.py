"""The routing policy against its own law: headroom first, then milliseconds."""

from dataclasses import replace

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from routing_cases import BLOCK_TOKENS, PER_TOKEN_ONLY, a_load, a_request, a_view

from cluster.load import StepCoefficients
from serving.messages import Overloaded, Route, RouteRequest
from serving.routing import (
    FleetLoad,
    NoHeadroom,
    ReplicaView,
    demand_blocks,
    drain_ms,
    growth_prior,
    headroom_blocks,
    pick,
    predicted_ms,
    wait_ms,
)


def chosen(request: RouteRequest, *views: ReplicaView) -> str:
    answer = pick(request, FleetLoad(views, BLOCK_TOKENS))
    assert isinstance(answer, Route), answer
    return answer.replica_id


def test_growth_prior_is_bounded_by_what_the_client_allows() -> None:
    """Nobody reserves more growth than max_tokens, nor more than 256 tokens without knowing more."""
    assert [growth_prior(limit) for limit in (1, 256, 257, 100_000)] == [1, 256, 256, 256]


def test_demand_counts_prompt_and_growth_rounded_up_once() -> None:
    """100 prompt and 13 new tokens share their eighth block: ceil(113 / 16) = 8, not 7 + 1."""
    request = a_request(100, max_tokens=13, expected_new_tokens=256)
    assert demand_blocks(request, BLOCK_TOKENS, 100) == 8
    assert demand_blocks(request, BLOCK_TOKENS, 7) == 7


def test_headroom_is_the_designs_formula() -> None:
    """free 40 + evictable 20 - reserved 15 - dispatched 10 - demand ceil((160 + 64) / 16) = 14 is 21."""
    load = a_load(blocks_free=40, blocks_evictable=20, blocks_reserved=15)
    view = ReplicaView(load=load, rtt_ms=0.0, dispatched_blocks=10)
    assert headroom_blocks(view, a_request(), BLOCK_TOKENS) == 21


def test_prediction_is_the_documented_formula() -> None:
    """Worked by hand: 512-token steps, 12 decoding, a backlog of 700 and a prompt of 900 tokens."""
    step = StepCoefficients(base_ms=5.0, per_token_ms=0.1, per_kv_token_ms=0.001)
    view = a_view(
        rtt_ms=75.0,
        step=step,
        num_running=12,
        decode_kv_tokens=6000,
        prefill_backlog_tokens=700,
        blocks_total=1000,
        blocks_free=1000,
    )
    chunk_ms = 5.0 + 0.1 * 12 + 0.001 * 6000  # 12.2: a step with its decodes alone
    # 500 prompt tokens fit beside 12 decodes: 700 take 2 steps, 700 + 900 take 4, 900 alone takes 2.
    wait = chunk_ms + 2 * chunk_ms + 700 * 0.1
    work = 2 * chunk_ms + 900 * 0.1 + 0.001 * 900 * 3 / 2
    request = a_request(900)
    assert wait_ms(view) == pytest.approx(wait)
    assert predicted_ms(view, request, BLOCK_TOKENS) == pytest.approx(75.0 + wait + work)


def test_a_short_queue_near_beats_an_empty_replica_far_away() -> None:
    """60 ms of backlog here is less than 75 ms of ocean: the request stays."""
    near = a_view("near", prefill_backlog_tokens=600, step=PER_TOKEN_ONLY)
    far = a_view("far", rtt_ms=75.0, region="eu-west", step=PER_TOKEN_ONLY)
    assert chosen(a_request(), near, far) == "near"


def test_a_long_queue_near_loses_to_an_empty_replica_far_away() -> None:
    """90 ms of backlog here is more than 75 ms of ocean: the request crosses."""
    near = a_view("near", prefill_backlog_tokens=900, step=PER_TOKEN_ONLY)
    far = a_view("far", rtt_ms=75.0, region="eu-west", step=PER_TOKEN_ONLY)
    assert chosen(a_request(), near, far) == "far"


def test_room_far_away_beats_no_room_near() -> None:
    """A near replica that is one block short is not admissible at any speed."""
    near = a_view("near", blocks_free=13)
    far = a_view("far", rtt_ms=220.0, region="ap-southeast", blocks_free=14)
    assert chosen(a_request(), near, far) == "far"


def test_a_prefix_match_shortens_the_work_and_not_the_demand() -> None:
    """Nine matched blocks save 144 tokens of prefill, and the request still wants its 14 blocks."""
    cold = a_view("cold", step=PER_TOKEN_ONLY)
    warm = ReplicaView(load=a_load("warm", step=PER_TOKEN_ONLY), rtt_ms=0.0, matched_blocks=9)
    request = a_request()
    assert chosen(request, cold, warm) == "warm"
    saved = predicted_ms(cold, request, BLOCK_TOKENS) - predicted_ms(warm, request, BLOCK_TOKENS)
    assert saved == pytest.approx(144 * 0.1)
    assert headroom_blocks(warm, request, BLOCK_TOKENS) == headroom_blocks(cold, request, BLOCK_TOKENS)


def test_equal_milliseconds_are_settled_by_headroom_then_by_turns() -> None:
    """Of two idle replicas the emptier wins; of two equal ones the one routed to longest ago."""
    assert chosen(a_request(), a_view("a", blocks_free=50), a_view("b", blocks_free=51)) == "b"
    first = ReplicaView(load=a_load("a"), rtt_ms=0.0, last_routed=7)
    second = ReplicaView(load=a_load("b"), rtt_ms=0.0, last_routed=6)
    assert chosen(a_request(), first, second) == "b"


def test_a_doubted_report_is_used_only_when_no_fresh_one_has_room() -> None:
    """4 s old is doubted, 11 s old is dropped; the doubted replica is faster and still comes second."""
    doubted = a_view("doubted", age_s=4.0)
    slow = a_view("slow", rtt_ms=500.0)
    full = a_view("full", blocks_free=0)
    silent = a_view("silent", age_s=11.0)
    assert chosen(a_request(), doubted, slow, silent) == "slow"
    assert chosen(a_request(), doubted, full, silent) == "doubted"
    assert isinstance(pick(a_request(), FleetLoad((full, silent))), NoHeadroom)


def test_a_prompt_no_pool_could_hold_is_refused_for_good() -> None:
    """1,600 tokens of pool take a prompt of 1,599, because the answer needs one; not of 1,600."""
    fleet = FleetLoad((a_view(), a_view("small", blocks_total=50, blocks_free=50)), BLOCK_TOKENS)
    assert isinstance(pick(a_request(1599), fleet), Route)
    refusal = pick(a_request(1600), fleet)
    assert isinstance(refusal, Overloaded) and refusal.permanent
    assert "1600 tokens" in refusal.why and "at most 1599" in refusal.why


def test_growth_beyond_the_pool_is_capped_not_refused() -> None:
    """A prompt that fits with a long answer that does not asks for the whole pool, and gets it when idle."""
    route = pick(a_request(1500, max_tokens=4000, expected_new_tokens=4000), FleetLoad((a_view(),)))
    assert isinstance(route, Route) and route.reserve_blocks == 100


def test_no_replica_at_all_is_a_reason_to_wait_not_an_error() -> None:
    """An unknown model or a region without replicas may just be restarting."""
    answer = pick(a_request(), FleetLoad(()))
    assert isinstance(answer, NoHeadroom) and "no replica of m" in answer.why


def test_drain_is_littles_law() -> None:
    """60 blocks in use by sequences of 100 steps of 6 ms leave at 0.1 a ms: 30 of them take 300 ms."""
    busy = a_view(blocks_free=40, num_running=10, step=StepCoefficients(5.0, 0.1, 0.0))
    assert drain_ms(30, 100, [busy]) == pytest.approx(300.0)
    assert drain_ms(30, 100, [a_view()]) is None


@st.composite
def any_view(draw: st.DrawFn) -> ReplicaView:
    load = a_load(
        f"r{draw(st.integers(0, 10_000))}",
        model=draw(st.sampled_from(["m", "m", "m", "other"])),
        region=draw(st.sampled_from(["us-east", "eu-west"])),
        blocks_free=draw(st.integers(0, 100)),
        blocks_reserved=draw(st.integers(0, 60)),
        num_running=draw(st.integers(0, 64)),
        prefill_backlog_tokens=draw(st.integers(0, 5000)),
        draining=draw(st.sampled_from([False, False, False, True])),
    )
    return ReplicaView(
        load=load,
        rtt_ms=draw(st.sampled_from([0.0, 0.4, 75.0])),
        age_s=draw(st.sampled_from([0.0, 2.9, 3.1, 9.9, 10.1])),
        dispatched_blocks=draw(st.integers(0, 60)),
        held=draw(st.sampled_from([False, False, False, True])),
    )


fleets = st.lists(any_view(), max_size=6, unique_by=lambda view: view.load.replica_id).map(
    lambda fleet: FleetLoad(tuple(fleet), BLOCK_TOKENS)
)
requests = st.builds(
    a_request,
    st.integers(1, 2000),
    max_tokens=st.integers(1, 400),
    expected_new_tokens=st.integers(1, 256),
    allowed_regions=st.sampled_from([(), ("us-east",), ("us-east", "eu-west"), ("nowhere",)]),
    refused_replicas=st.lists(st.integers(0, 5).map("r{}".format), max_size=3).map(tuple),
)


def may_go(view: ReplicaView, request: RouteRequest) -> bool:
    """The filter, written again from the design rather than from the code."""
    load = view.load
    room = load.blocks_free + load.blocks_evictable - load.blocks_reserved - view.dispatched_blocks
    wanted = request.prompt_tokens + min(request.expected_new_tokens, request.max_tokens)
    return (
        load.model == request.model
        and (load.region in request.allowed_regions or not request.allowed_regions)
        and load.replica_id not in request.refused_replicas
        and not (load.draining or view.held or view.age_s > 10.0)
        and request.prompt_tokens < load.blocks_total * BLOCK_TOKENS
        and room >= min(-(-wanted // BLOCK_TOKENS), load.blocks_total)
    )


@settings(max_examples=300, deadline=None)
@given(requests, fleets)
def test_a_route_goes_to_the_soonest_admissible_replica_and_there_is_one_whenever_there_can_be(
    request: RouteRequest, fleet: FleetLoad
) -> None:
    """Never inadmissible, refused or filtered; fresh before doubted; within 1 ms of the least."""
    admissible = {view.load.replica_id: view for view in fleet.replicas if may_go(view, request)}
    answer = pick(request, fleet)
    assert isinstance(answer, Route) == bool(admissible)
    if isinstance(answer, Route):
        best = admissible[answer.replica_id]
        rivals = [view for view in admissible.values() if view.age_s <= 3.0] or list(admissible.values())
        assert best in rivals
        least = min(predicted_ms(view, request, BLOCK_TOKENS) for view in rivals)
        assert answer.predicted_ms <= least + 1.0
        assert answer.reserve_blocks == demand_blocks(request, BLOCK_TOKENS, best.load.blocks_total)


@settings(max_examples=200, deadline=None)
@given(requests, fleets, st.integers(1, 50))
def test_more_room_on_the_chosen_replica_never_loses_it_the_request(
    request: RouteRequest, fleet: FleetLoad, more: int
) -> None:
    """The pick is monotone in headroom: giving the winner blocks leaves it the winner."""
    answer = pick(request, fleet)
    if not isinstance(answer, Route):
        return
    roomier = tuple(
        replace(view, load=msgspec.structs.replace(view.load, blocks_evictable=more))
        if view.load.replica_id == answer.replica_id
        else view
        for view in fleet.replicas
    )
    again = pick(request, FleetLoad(roomier, BLOCK_TOKENS))
    assert isinstance(again, Route) and again.replica_id == answer.replica_id
