"""The routing policy against its own law: headroom first, then everybody's milliseconds."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from routing_cases import BLOCK_TOKENS, PER_TOKEN_ONLY, a_load, a_request

from cluster.load import ReplicaLoad, StepCoefficients
from serving.dispatch_book import DispatchBook
from serving.fleet import Fleet
from serving.messages import Overloaded, Route, RouteRequest
from serving.routing import Floats, NoHeadroom, Prompt, Replicas, Scores, Traffic, drain_ms, pick, score

NOW = 1_000.0
RTT_MS = {"us-east": 0.0, "eu-west": 75.0, "ap-southeast": 220.0}


def fleet_of(*loads: ReplicaLoad, ages_s: dict[str, float] | None = None) -> Fleet:
    fleet = Fleet(RTT_MS, {}, stale_after_s=3.0, drop_after_s=10.0)
    fleet.set_members({load.replica_id for load in loads})
    for load in loads:
        fleet.report(load, NOW - (ages_s or {}).get(load.replica_id, 0.0))
    return fleet


def answer_of(
    fleet: Fleet,
    request: RouteRequest,
    *,
    matched: dict[str, int] | None = None,
    traffic: Traffic | None = None,
    seed: int = 0,
) -> Route | Overloaded | NoHeadroom:
    traffic = traffic or Traffic()
    replicas = fleet.replicas(DispatchBook(5.0))
    candidates = fleet.candidates(request, fleet.serving(request), None, traffic, NOW)
    depths = matched_rows(fleet, matched or {})
    prompt = Prompt(request.prompt_tokens, request.max_tokens, BLOCK_TOKENS)
    return pick(request, prompt, replicas, candidates, depths, traffic, random.Random(seed))


def matched_rows(fleet: Fleet, matched: dict[str, int]) -> np.ndarray:
    depths = np.zeros(fleet.num_rows, dtype=np.int64)
    for name, blocks in matched.items():
        depths[fleet.row(name)] = blocks
    return depths


def chosen(request: RouteRequest, *loads: ReplicaLoad, **more: object) -> str:
    answer = answer_of(fleet_of(*loads), request, **more)  # type: ignore[arg-type]
    assert isinstance(answer, Route), answer
    return answer.replica_id


def scores_of(load: ReplicaLoad, prompt: Prompt, matched: int, traffic: Traffic) -> tuple[Scores, int]:
    fleet = fleet_of(load)
    replicas = fleet.replicas(DispatchBook(5.0))
    row = fleet.row(load.replica_id)
    depths = matched_rows(fleet, {load.replica_id: matched})
    return score(prompt, replicas, wait_ms_of(replicas), depths, traffic), row


def wait_ms_of(replicas: Replicas) -> Floats:
    return np.maximum(0.0, 1000 * (replicas.busy_until_s - NOW))


def test_demand_counts_prompt_and_growth_rounded_up_once() -> None:
    """100 prompt and 13 new tokens share their eighth block: ceil(113 / 16) = 8, not 7 + 1."""
    assert Prompt(100, 13, BLOCK_TOKENS).demand_blocks == 8


def test_headroom_is_the_designs_formula() -> None:
    """free 40 + evictable 20 - reserved 15 is room for 45 blocks: 720 tokens, and not one more."""
    load = a_load(blocks_free=40, blocks_evictable=20, blocks_reserved=15)
    assert isinstance(answer_of(fleet_of(load), a_request(720 - 64)), Route)
    short = answer_of(fleet_of(load), a_request(721 - 64))
    assert isinstance(short, NoHeadroom) and "short of 1 KV blocks" in short.why


def test_the_score_is_the_documented_formula() -> None:
    """Worked by hand: 512-token steps, 12 decoding, a backlog of 700; of 900 tokens 400 are cached."""
    step = StepCoefficients(base_ms=5.0, per_token_ms=0.1, per_kv_token_ms=0.001)
    load = a_load(
        region="eu-west",
        step=step,
        num_running=12,
        decode_kv_tokens=6000,
        prefill_backlog_tokens=700,
        blocks_total=1000,
        blocks_free=10,
        blocks_evictable=900,
    )
    traffic = Traffic(busy=0.8, reuse=0.5, per_replica_s=2.0)
    scores, row = scores_of(load, Prompt(900, 60, BLOCK_TOKENS), 25, traffic)
    step_ms = 5.0 + 0.1 * 12 + 0.001 * 6000  # 12.2: a step with its decodes alone
    chunk_ms = step_ms + 0.1 * 500  # 500 prompt tokens fit beside 12 decodes
    wait = step_ms + chunk_ms + (step_ms + 0.1 * 200)
    work = 500 * chunk_ms / 500 + 0.001 * 500 * (1 + 1) / 2
    assert scores.work[row] == pytest.approx(work)
    assert scores.own[row] == pytest.approx(75.0 + wait + work)
    evicted = 60 - 25 - 10  # blocks of the demand that are neither cached nor free
    later = work * 0.002 * (wait + work) / 0.2
    move = 75.0 * 0.5 / 0.5
    others = later + 12 * (work - step_ms) / 60 + evicted * 0.5 * BLOCK_TOKENS * chunk_ms / 500 + move
    assert scores.total[row] - scores.own[row] == pytest.approx(others)


def test_a_short_queue_near_beats_an_empty_replica_far_away() -> None:
    """60 ms of backlog here is less than 75 ms of ocean, 90 ms is more."""
    far = a_load("far", region="eu-west", step=PER_TOKEN_ONLY)
    short = a_load("near", prefill_backlog_tokens=600, step=PER_TOKEN_ONLY)
    long = a_load("near", prefill_backlog_tokens=1000, step=PER_TOKEN_ONLY)
    assert chosen(a_request(), short, far) == "near"
    assert chosen(a_request(), long, far) == "far"


def test_room_far_away_beats_no_room_near() -> None:
    """A near replica that is one block short is not admissible at any speed."""
    near = a_load("near", blocks_free=13)
    far = a_load("far", region="ap-southeast", blocks_free=14)
    assert chosen(a_request(), near, far) == "far"


def test_what_saves_work_wins_the_busier_the_fleet_is() -> None:
    """40 ms of cached work lose to 60 ms less backlog while idle, and win in a busy fleet."""
    cold = a_load("cold", step=PER_TOKEN_ONLY, blocks_total=1000, blocks_free=1000)
    warm = a_load(
        "warm", step=PER_TOKEN_ONLY, blocks_total=1000, blocks_free=1000, prefill_backlog_tokens=600
    )
    matched = {"warm": 25}
    assert chosen(a_request(500), cold, warm, matched=matched) == "cold"
    traffic = Traffic(busy=0.8, per_replica_s=10.0)
    assert chosen(a_request(500), cold, warm, matched=matched, traffic=traffic) == "warm"


def test_a_replica_without_a_seat_makes_wait_for_one() -> None:
    """Blocks it has, but as many sequences as may run at once: the next sits when one of 64 has ended."""
    full = a_load("full", num_running=64, decode_kv_tokens=100, step=StepCoefficients(5.0, 0.0, 0.0))
    busy = a_load("busy", num_running=63, decode_kv_tokens=100, step=StepCoefficients(5.0, 0.0, 0.0))
    assert chosen(a_request(), full, busy) == "busy"
    prompt = Prompt(160, 64, BLOCK_TOKENS)
    waits = [scores_of(load, prompt, 0, Traffic())[0].wait[0] for load in (full, busy)]
    assert waits[0] - waits[1] == pytest.approx(64 * 5.0 / 64)


def test_a_replica_that_has_hardly_run_is_judged_by_a_like_one() -> None:
    """Its prior says 2 ms a token where its neighbours learned 0.1: it is tried nevertheless."""
    slow = StepCoefficients(5.0, 2.0, 0.0)
    new = a_load("new", step=slow, num_observations=3)
    old = a_load("old", step=StepCoefficients(5.0, 0.1, 0.0), prefill_backlog_tokens=200)
    assert chosen(a_request(), new, old) == "new"
    told = a_load("new", step=slow, num_observations=500)
    assert chosen(a_request(), told, old) == "old"


def test_what_every_replica_has_cached_decides_nothing() -> None:
    """A system prompt that all hold leaves the order to the rest: here, to the backlog."""
    one, other = (a_load(name, step=PER_TOKEN_ONLY) for name in "ab")
    other = a_load("b", step=PER_TOKEN_ONLY, prefill_backlog_tokens=300)
    everywhere = {"a": 9, "b": 9}
    traffic = Traffic(busy=0.9, per_replica_s=10.0)
    assert chosen(a_request(), one, other, matched=everywhere, traffic=traffic) == "a"


def test_equal_scores_break_at_random_towards_room() -> None:
    """Of equal replicas each gets some; one with more room gets more."""
    loads = [a_load("a", blocks_free=50), a_load("b", blocks_free=50), a_load("c", blocks_free=90)]
    homes = [chosen(a_request(), *loads, seed=seed) for seed in range(200)]
    assert min(homes.count(name) for name in "ab") >= 20
    assert homes.count("c") > max(homes.count("a"), homes.count("b"))


def test_old_views_are_told_apart_less() -> None:
    """2 s old, with four requests a second of others in 50 ms each, 100 ms of backlog may be none."""
    loads = [a_load("a", step=PER_TOKEN_ONLY), a_load("b", step=PER_TOKEN_ONLY, prefill_backlog_tokens=1000)]
    fresh = [chosen(a_request(), *loads, seed=seed) for seed in range(50)]
    assert set(fresh) == {"a"}
    traffic = Traffic(mean_work_ms=50.0, others_per_s=4.0)
    fleet = fleet_of(*loads, ages_s={"a": 2.0, "b": 2.0})
    answers = [answer_of(fleet, a_request(), traffic=traffic, seed=seed) for seed in range(50)]
    assert {answer.replica_id for answer in answers if isinstance(answer, Route)} == {"a", "b"}


def test_a_doubted_report_is_used_only_when_no_fresh_one_has_room() -> None:
    """4 s old is doubted, 11 s old is dropped; the doubted replica is faster and still comes second."""
    slow = a_load("slow", region="ap-southeast")
    full = a_load("full", blocks_free=0)
    ages = {"doubted": 4.0, "silent": 11.0}
    first = answer_of(fleet_of(a_load("doubted"), slow, a_load("silent"), ages_s=ages), a_request())
    assert isinstance(first, Route) and first.replica_id == "slow"
    second = answer_of(fleet_of(a_load("doubted"), full, a_load("silent"), ages_s=ages), a_request())
    assert isinstance(second, Route) and second.replica_id == "doubted"
    assert isinstance(answer_of(fleet_of(full, a_load("silent"), ages_s=ages), a_request()), NoHeadroom)


def test_when_all_are_silent_work_goes_on_by_what_is_remembered() -> None:
    """News that fails to come stops nobody: all running replicas are taken, those with room, in turn."""
    ages = {"a": 60.0, "b": 60.0, "full": 60.0}
    fleet = fleet_of(a_load("a"), a_load("b"), a_load("full", blocks_free=0), ages_s=ages)
    answers = [answer_of(fleet, a_request(), seed=seed) for seed in range(40)]
    homes = {answer.replica_id for answer in answers if isinstance(answer, Route)}
    assert homes == {"a", "b"}


def test_a_prompt_no_pool_could_hold_is_refused_for_good() -> None:
    """1,600 tokens of pool take a prompt of 1,599, because the answer needs one; not of 1,600."""
    fleet = fleet_of(a_load(), a_load("small", blocks_total=50, blocks_free=50))
    assert isinstance(answer_of(fleet, a_request(1599)), Route)
    refusal = answer_of(fleet, a_request(1600))
    assert isinstance(refusal, Overloaded) and refusal.permanent
    assert "1600 tokens" in refusal.why and "at most 1599" in refusal.why


def test_growth_beyond_the_pool_is_capped_not_refused() -> None:
    """A prompt that fits with a long answer that does not asks for the whole pool, and gets it when idle."""
    route = answer_of(fleet_of(a_load()), a_request(1500, max_tokens=4000))
    assert isinstance(route, Route) and route.reserve_blocks == 100


def test_no_replica_at_all_is_a_reason_to_wait_not_an_error() -> None:
    """An unknown model or a region without replicas may just be restarting."""
    answer = answer_of(fleet_of(a_load(model="other")), a_request())
    assert isinstance(answer, NoHeadroom) and "no replica of m" in answer.why


def test_drain_is_littles_law() -> None:
    """60 blocks in use by sequences of 100 steps of 6 ms leave at 0.1 a ms: 30 of them take 300 ms."""
    busy = fleet_of(a_load(blocks_free=40, num_running=10, step=StepCoefficients(5.0, 0.1, 0.0)))
    serves = busy.serving(a_request())
    assert drain_ms(30, 100, busy.replicas(DispatchBook(5.0)), serves) == pytest.approx(300.0)
    idle = fleet_of(a_load())
    assert drain_ms(30, 100, idle.replicas(DispatchBook(5.0)), serves) is None


any_load = st.builds(
    a_load,
    st.integers(0, 10_000).map("r{}".format),
    model=st.sampled_from(["m", "m", "m", "other"]),
    region=st.sampled_from(["us-east", "eu-west"]),
    blocks_free=st.integers(0, 100),
    blocks_reserved=st.integers(0, 60),
    num_running=st.integers(0, 64),
    prefill_backlog_tokens=st.integers(0, 5000),
    draining=st.sampled_from([False, False, False, True]),
)
any_fleet = st.lists(
    st.tuples(any_load, st.sampled_from([0.0, 2.9, 3.1, 9.9, 10.1])),
    max_size=12,
    unique_by=lambda drawn: drawn[0].replica_id,
)
any_traffic = st.builds(Traffic, busy=st.floats(0, 2), reuse=st.floats(0, 1), per_replica_s=st.floats(0, 100))
any_request = st.builds(
    a_request,
    st.integers(1, 2000),
    max_tokens=st.integers(1, 400),
    allowed_regions=st.sampled_from([(), ("us-east",), ("us-east", "eu-west"), ("nowhere",)]),
    refused_replicas=st.lists(st.integers(0, 5).map("r{}".format), max_size=3).map(tuple),
)


def serves(load: ReplicaLoad, request: RouteRequest) -> bool:
    return load.model == request.model and (
        load.region in request.allowed_regions or not request.allowed_regions
    )


def may_go(load: ReplicaLoad, is_silent: bool, request: RouteRequest) -> bool:
    """The filter, written again from the design rather than from the code."""
    room = load.blocks_free + load.blocks_evictable - load.blocks_reserved
    wanted = request.prompt_tokens + request.max_tokens
    return (
        serves(load, request)
        and load.replica_id not in request.refused_replicas
        and not (load.draining or is_silent)
        and request.prompt_tokens < load.blocks_total * BLOCK_TOKENS
        and room >= min(-(-wanted // BLOCK_TOKENS), load.blocks_total)
    )


@settings(max_examples=300, deadline=None)
@given(any_request, any_fleet, any_traffic, st.integers(0, 5))
def test_a_route_goes_to_an_admissible_replica_and_there_is_one_whenever_there_can_be(
    request: RouteRequest, drawn: list[tuple[ReplicaLoad, float]], traffic: Traffic, seed: int
) -> None:
    """Never inadmissible, refused or filtered; fresh before doubted; no dearer than noise allows."""
    loads = {load.replica_id: load for load, _ in drawn}
    ages = {load.replica_id: age_s for load, age_s in drawn}
    served = [name for name, load in loads.items() if serves(load, request) and not load.draining]
    all_silent = all(ages[name] > 10.0 for name in served)
    admissible = {
        name for name, load in loads.items() if may_go(load, ages[name] > 10.0 and not all_silent, request)
    }
    fleet = fleet_of(*loads.values(), ages_s=ages)
    answer = answer_of(fleet, request, traffic=traffic, seed=seed)
    assert isinstance(answer, Route) == bool(admissible)
    if not isinstance(answer, Route):
        return
    fresh = {name for name in admissible if ages[name] <= 3.0}
    assert answer.replica_id in (fresh or admissible)
    candidates = fleet.candidates(request, fleet.serving(request), None, traffic, NOW)
    prompt = Prompt(request.prompt_tokens, request.max_tokens, BLOCK_TOKENS)
    nothing = np.zeros(fleet.num_rows, dtype=np.int64)
    replicas = fleet.replicas(DispatchBook(5.0))
    scores = score(prompt, replicas, candidates.wait_ms, nothing, traffic)
    rows = {name: fleet.row(name) for name in (fresh or admissible)}
    least = min(rows.values(), key=lambda row: scores.total[row])
    noise = 1.0 + 0.05 * abs(scores.work[rows[answer.replica_id]] - scores.work[least])
    for row in (least, rows[answer.replica_id]):
        noise += candidates.noise_ms[row] + 12**-0.5 * replicas.step_ms[row] * (replicas.running[row] > 0)
    assert scores.total[rows[answer.replica_id]] <= scores.total[least] + noise + 1e-6


@settings(max_examples=150, deadline=None)
@given(any_request, any_fleet, st.integers(1, 50), st.integers(0, 5))
def test_more_room_never_makes_a_replica_inadmissible_or_dearer(
    request: RouteRequest, drawn: list[tuple[ReplicaLoad, float]], more: int, seed: int
) -> None:
    """The pick is monotone in headroom: the winner with more room is among the best still."""
    loads = [load for load, _ in drawn]
    answer = answer_of(fleet_of(*loads), request, seed=seed)
    if not isinstance(answer, Route):
        return
    roomier = [
        a_load(**{**_fields(load), "blocks_evictable": more})
        if load.replica_id == answer.replica_id
        else load
        for load in loads
    ]
    before, after = fleet_of(*loads), fleet_of(*roomier)
    again = answer_of(after, request, seed=seed)
    assert isinstance(again, Route)
    row, prompt = (
        after.row(answer.replica_id),
        Prompt(request.prompt_tokens, request.max_tokens, BLOCK_TOKENS),
    )
    nothing = np.zeros(after.num_rows, dtype=np.int64)
    totals = []
    for fleet in (before, after):
        replicas = fleet.replicas(DispatchBook(5.0))
        totals.append(score(prompt, replicas, wait_ms_of(replicas), nothing, Traffic()).total[row])
    assert totals[1] <= totals[0]


def _fields(load: ReplicaLoad) -> dict[str, object]:
    return {name: getattr(load, name) for name in load.__struct_fields__}
