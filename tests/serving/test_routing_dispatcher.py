"""The Router's state machine, one event at a time: counting once, order, refusals, staleness, bounds."""

import msgspec
import pytest
from routing_cases import BLOCK_TOKENS, a_load, a_request

from cluster.load import ReplicaLoad, StepCoefficients
from serving.dispatcher import Dispatcher, DispatcherLimits
from serving.messages import (
    BlockSnapshot,
    DispatchUpdate,
    Overloaded,
    Queued,
    Refusal,
    Route,
    RouteReply,
    RouteRequest,
)

NOW = 1_000.0
RTT_MS = {"us-east": 0.0, "eu-west": 75.0}


def a_router(*loads: ReplicaLoad, **limits: float) -> Dispatcher:
    router = Dispatcher(DispatcherLimits(**limits), RTT_MS, block_tokens=BLOCK_TOKENS)  # type: ignore[arg-type]
    router.membership({load.replica_id for load in loads}, NOW)
    for load in loads:
        router.replica_reported(load, NOW)
    return router


def asking(name: str, **changes: object) -> RouteRequest:
    """A request of 14 blocks, named, that gives up long after these tests end."""
    return a_request(request_id=name, **changes)


def update(name: str, replica_id: str, outcome: str, submission: int = 0) -> DispatchUpdate:
    return DispatchUpdate(request_id=name, replica_id=replica_id, outcome=outcome, submission=submission)  # type: ignore[arg-type]


def routed(reply: RouteReply) -> str:
    assert isinstance(reply, Route), reply
    return reply.replica_id


def dispatched(router: Dispatcher, now: float = NOW) -> dict[str, int]:
    router.check_integrity()
    return {status.load.replica_id: status.dispatched_blocks for status in router.status(now).replicas}


def test_a_burst_of_equal_requests_spreads_over_equal_replicas() -> None:
    """Without one new report, 28 requests land 7 on each of 4 replicas, and the next one waits."""
    router = a_router(*(a_load(f"r{i}") for i in range(4)))
    homes = [routed(router.request(asking(f"q{i}"), NOW)) for i in range(28)]
    assert {name: homes.count(name) for name in homes} == {"r0": 7, "r1": 7, "r2": 7, "r3": 7}
    assert isinstance(router.request(asking("one-more"), NOW), Queued)


def test_an_unreported_burst_is_backlog() -> None:
    """1,600-token prompts of 160 ms each: the second would wait 160 ms here, so it crosses 75 ms of ocean.

    The third would wait 160 ms on either side, so it stays at home.
    """
    step = StepCoefficients(0.0, 0.1, 0.0)
    roomy = a_load(step=step, blocks_total=1000, blocks_free=1000)
    home = msgspec.structs.replace(roomy, replica_id="home")
    abroad = msgspec.structs.replace(roomy, replica_id="abroad", region="eu-west")
    router = a_router(home, abroad)
    homes = [routed(router.request(asking(f"q{i}", prompt_tokens=1600), NOW)) for i in range(3)]
    assert homes == ["home", "abroad", "home"]


def test_requests_one_at_a_time_go_to_all_equal_replicas() -> None:
    """Ties break at random: of 60 requests, each ended before the next came, each of three gets some."""
    router = a_router(a_load("a"), a_load("b"), a_load("c"))
    homes = []
    for i in range(60):
        homes.append(routed(router.request(asking(f"q{i}"), NOW)))
        router.update(update(f"q{i}", homes[-1], "finished"), NOW)
    assert min(homes.count(name) for name in "abc") >= 8


@pytest.mark.parametrize("report_comes_first", [False, True])
def test_a_dispatch_is_counted_until_a_report_includes_it(report_comes_first: bool) -> None:
    """14 blocks count from the Route to the report with its submission, in whichever order news comes."""
    router = a_router(a_load("a"))
    routed(router.request(asking("q"), NOW))
    assert dispatched(router) == {"a": 14}
    accepted = update("q", "a", "accepted", submission=3)
    without = a_load("a", sequence=2, last_submission=2)
    included = a_load("a", sequence=3, last_submission=3, blocks_reserved=14)
    if report_comes_first:
        router.replica_reported(included, NOW)
        assert dispatched(router) == {"a": 14}
        router.update(accepted, NOW)
    else:
        router.update(accepted, NOW)
        router.replica_reported(without, NOW)
        assert dispatched(router) == {"a": 14}
        router.replica_reported(included, NOW)
    assert dispatched(router) == {"a": 0}
    assert router.status(NOW).replicas[0].num_in_flight == 1
    router.update(update("q", "a", "finished"), NOW)
    assert router.status(NOW).replicas[0].num_in_flight == 0


def test_a_route_nobody_speaks_of_is_forgotten() -> None:
    """After 5 s without a word its blocks are free again, and the request that waits gets them."""
    router = a_router(a_load("a", blocks_free=20), drop_after_s=60.0)
    routed(router.request(asking("silent"), NOW))
    assert isinstance(router.request(asking("next"), NOW), Queued)
    assert router.tick(NOW + 4.9) == []
    ((ingress_id, reply),) = router.tick(NOW + 5.0)
    assert ingress_id == "ingress" and reply.request_id == "next" and routed(reply) == "a"


def test_a_new_epoch_resets_the_replica() -> None:
    """A restarted replica owes nothing: what its old process was sent and had cached is not counted."""
    router = a_router(a_load("a", epoch=1, sequence=90))
    prompt = (b"x" * 16, b"y" * 16)
    router.replica_events("a", 1, BlockSnapshot(last_number=2, block_hashes=prompt), NOW)
    routed(router.request(asking("q"), NOW))
    router.replica_reported(a_load("a", epoch=2, sequence=1), NOW)
    assert dispatched(router) == {"a": 0}
    route = router.request(asking("p", block_hashes=prompt), NOW)
    assert isinstance(route, Route) and route.matched_blocks == 0


def test_reports_out_of_order_are_ignored() -> None:
    """Neither an older sequence nor an older epoch undoes what a newer report said."""
    router = a_router(a_load("a", epoch=2, sequence=5, blocks_free=0))
    assert isinstance(router.request(asking("q"), NOW), Queued)
    for late in (
        a_load("a", epoch=2, sequence=4),
        a_load("a", epoch=2, sequence=5),
        a_load("a", epoch=1, sequence=9),
    ):
        assert router.replica_reported(late, NOW) == []
    ((_, reply),) = router.replica_reported(a_load("a", epoch=2, sequence=6), NOW)
    assert routed(reply) == "a"


def test_a_replica_must_be_reported_and_running() -> None:
    """A report from outside Serve's running set is no candidate until the set names it, and no more after."""
    router = a_router()
    router.replica_reported(a_load("a"), NOW)
    assert isinstance(router.request(asking("q"), NOW), Queued)
    ((_, reply),) = router.membership({"a", "b"}, NOW)
    assert routed(reply) == "a"
    assert router.status(NOW).unreported == ("b",)
    router.membership(set(), NOW)
    assert isinstance(router.request(asking("p"), NOW), Queued)


def test_silence_makes_a_replica_doubted_then_silent() -> None:
    """Its state in the status follows its last report's age: fresh, 3 s, 10 s."""
    router = a_router(a_load("a"), a_load("b", draining=True))
    states = [[replica.state for replica in router.status(NOW + age).replicas] for age in (3.0, 3.1, 10.1)]
    assert states == [["fresh", "draining"], ["doubted", "draining"], ["silent", "silent"]]
    assert [load.replica_id for load in router.loads(NOW + 10.0)] == ["a", "b"]
    assert router.loads(NOW + 10.1) == []


def test_a_refused_request_goes_elsewhere_at_once() -> None:
    """The refuser keeps none of its blocks, and is not asked again."""
    router = a_router(a_load("a"), a_load("b"))
    first = routed(router.request(asking("q"), NOW))
    second = routed(router.request(asking("q", refused_replicas=(first,)), NOW))
    assert {first, second} == {"a", "b"}
    assert dispatched(router) == {first: 0, second: 14}


def test_refused_by_all_it_waits_for_a_newer_report() -> None:
    """It is never an error: the refuser that next reports room for it gets it."""
    router = a_router(a_load("a", sequence=1))
    routed(router.request(asking("q"), NOW))
    assert isinstance(router.request(asking("q", refused_replicas=("a",)), NOW), Queued)
    assert router.replica_reported(a_load("a", sequence=2, blocks_free=13), NOW) == []
    ((_, reply),) = router.replica_reported(a_load("a", sequence=3), NOW)
    assert routed(reply) == "a"


def test_a_refused_request_keeps_its_place() -> None:
    """It came first, so it is first again, before those that queued while it was away."""
    router = a_router(a_load("a", blocks_free=14))
    routed(router.request(asking("first"), NOW))
    router.request(asking("second"), NOW)
    reply = router.request(asking("first", refused_replicas=("a",)), NOW)
    assert isinstance(reply, Queued) and reply.position == 1
    answers = router.replica_reported(a_load("a", sequence=2, blocks_free=14), NOW)
    assert [reply.request_id for _, reply in answers] == ["first"]


def test_news_of_an_older_route_does_not_touch_the_new_one() -> None:
    """A late "refused" about replica a leaves the dispatch on b counted."""
    router = a_router(a_load("a"), a_load("b"))
    first = routed(router.request(asking("q"), NOW))
    second = routed(router.request(asking("q", refused_replicas=(first,)), NOW))
    router.update(update("q", first, "refused"), NOW)
    assert dispatched(router)[second] == 14


def test_a_small_request_does_not_pass_a_large_one() -> None:
    """Head of line: 2 blocks are free, the one that wants 2 came later, so it waits; nobody starves."""
    router = a_router(a_load("a", blocks_free=2))
    router.request(asking("large"), NOW)
    small = router.request(asking("small", prompt_tokens=8, max_tokens=8), NOW)
    assert isinstance(small, Queued) and small.position == 2
    answers = router.replica_reported(a_load("a", sequence=2, blocks_free=16), NOW)
    assert [reply.request_id for _, reply in answers] == ["large", "small"]


def test_a_request_for_one_region_does_not_take_what_an_earlier_one_for_any_region_waits_for() -> None:
    """Order holds across constraints too, wherever two requests want the same replica."""
    router = a_router(a_load("us", blocks_free=2), a_load("eu", region="eu-west", blocks_free=2))
    router.request(asking("anywhere"), NOW)
    small = asking("eu-only", prompt_tokens=8, max_tokens=8, allowed_regions=("eu-west",))
    assert isinstance(router.request(small, NOW), Queued)
    roomier = a_load("eu", region="eu-west", sequence=2, blocks_free=13)
    assert router.replica_reported(roomier, NOW) == []  # enough for the small one, not for the first
    answers = router.replica_reported(msgspec.structs.replace(roomier, sequence=3, blocks_free=16), NOW)
    assert [reply.request_id for _, reply in answers] == ["anywhere", "eu-only"]


def test_a_later_request_may_take_what_no_earlier_one_can_use() -> None:
    """A full Europe keeps nobody out of America."""
    router = a_router(a_load("us"), a_load("eu", region="eu-west", blocks_free=0))
    assert isinstance(router.request(asking("eu-only", allowed_regions=("eu-west",)), NOW), Queued)
    assert routed(router.request(asking("anywhere"), NOW)) == "us"


def test_priority_goes_before_arrival() -> None:
    """Of three that wait, the lower number leaves first, then the earlier."""
    router = a_router(a_load("a", blocks_free=0))
    for name, priority in (("later", 1), ("latest", 1), ("urgent", 0)):
        router.request(asking(name, priority=priority), NOW)
    answers = router.replica_reported(a_load("a", sequence=2, blocks_free=28), NOW)
    assert [reply.request_id for _, reply in answers] == ["urgent", "later"]


def test_waiting_ends_at_the_deadline_or_the_longest_wait() -> None:
    """Each gets one Overloaded, at the sooner of the two, with a time to retry after."""
    router = a_router(a_load("a", blocks_free=0, num_running=10), max_wait_s=30.0)
    router.request(asking("hurried", deadline_s=NOW + 2.0), NOW)
    router.request(asking("patient"), NOW)
    assert router.tick(NOW + 1.9) == []
    ((_, hurried),) = router.tick(NOW + 2.0)
    ((_, patient),) = router.tick(NOW + 30.0)
    assert isinstance(hurried, Overloaded) and hurried.request_id == "hurried" and not hurried.permanent
    assert isinstance(patient, Overloaded) and patient.request_id == "patient"
    assert hurried.retry_after_s >= 1.0 and "2.0 s" in hurried.why
    assert router.num_waiting == 0
    assert isinstance(router.request(asking("late", deadline_s=NOW), NOW), Overloaded)


def test_the_queue_is_bounded_but_not_for_the_refused() -> None:
    """A third request is turned away at once; one that was routed and refused comes back in."""
    router = a_router(a_load("a", blocks_free=14), max_waiting_requests=1)
    routed(router.request(asking("routed"), NOW))
    assert isinstance(router.request(asking("waits"), NOW), Queued)
    assert isinstance(router.request(asking("too-many"), NOW), Overloaded)
    assert isinstance(router.request(asking("routed", refused_replicas=("a",)), NOW), Queued)


def test_predicted_wait_is_the_drain_of_what_is_ahead() -> None:
    """100 blocks held for 64 steps of 5 ms leave at 0.3125 a ms: 14 take 44.8 ms, 28 twice that."""
    running = a_load("a", blocks_free=0, num_running=1, step=StepCoefficients(5.0, 0.0, 0.0))
    router = a_router(running)
    first, second = (router.request(asking(name), NOW) for name in ("first", "second"))
    assert isinstance(first, Queued) and isinstance(second, Queued)
    assert (first.position, second.position) == (1, 2)
    assert first.predicted_wait_ms == pytest.approx(44.8)
    assert second.predicted_wait_ms == pytest.approx(89.6)


def test_a_lost_replica_is_left_alone_until_it_reports() -> None:
    """Ingress may know of a death before Serve does; one report shows that it was none."""
    router = a_router(a_load("a"))
    routed(router.request(asking("q"), NOW))
    router.replica_lost("a", NOW)
    router.update(update("q", "a", "lost"), NOW)
    assert isinstance(router.request(asking("q", refused_replicas=("a",)), NOW), Queued)
    ((_, reply),) = router.replica_reported(a_load("a", sequence=2), NOW)
    assert routed(reply) == "a"


def test_an_ingress_that_is_gone_leaves_nothing_behind() -> None:
    """Its queue places and dispatches go, and what it held goes to another Ingress's request."""
    router = a_router(a_load("a", blocks_free=14))
    routed(router.request(asking("its-own", ingress_id="gone"), NOW))
    router.request(asking("its-other", ingress_id="gone"), NOW)
    router.request(asking("theirs", ingress_id="alive"), NOW)
    ((ingress_id, reply),) = router.ingress_gone("gone", NOW)
    assert (ingress_id, reply.request_id) == ("alive", "theirs")
    assert router.num_waiting == 0 and dispatched(router) == {"a": 14}


def test_a_waiting_request_is_told_when_the_only_pool_that_could_hold_it_leaves() -> None:
    """It will never fit the replicas that remain, so it learns that now and not at its deadline."""
    big = a_load("big", blocks_total=200, blocks_free=0)
    router = a_router(big, a_load("small"))
    assert isinstance(router.request(asking("q", prompt_tokens=2000), NOW), Queued)
    ((_, reply),) = router.membership({"small"}, NOW)
    assert isinstance(reply, Overloaded) and reply.permanent


def test_a_status_survives_the_wire() -> None:
    """`searoom status` reads what the Router wrote."""
    router = a_router(a_load("a"))
    status = router.status(NOW)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(status), type=type(status)) == status


def test_tenants_share_what_room_there_is() -> None:
    """Ten requests of one tenant wait before one of another: the other's leaves second."""
    router = a_router(a_load("a", blocks_free=0))
    for i in range(10):
        router.request(asking(f"many{i}", tenant_key="many"), NOW)
    reply = router.request(asking("one", tenant_key="one"), NOW)
    assert isinstance(reply, Queued) and reply.position == 2
    answers = router.replica_reported(a_load("a", sequence=2, blocks_free=28), NOW)
    assert [reply.request_id for _, reply in answers] == ["many0", "one"]


def test_who_was_idle_has_saved_nothing_up() -> None:
    """A tenant that comes back starts with the least service of those who wait, not with none."""
    router = a_router(a_load("a", blocks_free=56), max_waiting_requests=50)
    for i in range(4):
        routed(router.request(asking(f"busy{i}", tenant_key="busy"), NOW))
    for i in range(4):
        router.request(asking(f"wait{i}", tenant_key="busy"), NOW)
        router.request(asking(f"back{i}", tenant_key="back"), NOW)
    answers = router.replica_reported(a_load("a", sequence=2, blocks_free=112), NOW)
    order = [reply.request_id[:4] for _, reply in answers]
    assert sorted(order[:2]) == ["back", "wait"] and sorted(order[2:4]) == ["back", "wait"]


def test_a_refused_request_is_charged_once() -> None:
    """Its tenant's service is the same after a refusal and a second Route as after one Route."""
    router = a_router(a_load("a"), a_load("b"))
    first = routed(router.request(asking("q"), NOW))
    once = dict(router._queue._service)
    routed(router.request(asking("q", refused_replicas=(first,)), NOW))
    assert router._queue._service == once


def test_a_deadline_that_cannot_be_met_is_refused_at_once() -> None:
    """150 blocks ahead at 0.15 a ms take a second; who has less time is told now, with the time to retry."""
    busy = a_load("a", blocks_free=0, num_running=10, step=StepCoefficients(10.0, 0.0, 0.0))
    router = a_router(busy)
    for i in range(11):
        router.request(asking(f"q{i}"), NOW)
    late = router.request(asking("late", deadline_s=NOW + 0.5), NOW)
    assert isinstance(late, Overloaded) and "deadline" in late.why and late.retry_after_s >= 1.0
    assert isinstance(router.request(asking("patient", deadline_s=NOW + 60), NOW), Queued)
    assert router.num_waiting == 12


def test_the_queue_is_bounded_in_bytes() -> None:
    """Long prompts bring long lists of hashes."""
    router = a_router(a_load("a", blocks_free=0), max_waiting_bytes=10_000)
    hashes = tuple(bytes([i]) * 16 for i in range(100))
    assert isinstance(router.request(asking("first", block_hashes=hashes), NOW), Queued)
    assert isinstance(router.request(asking("second", block_hashes=hashes), NOW), Overloaded)


def test_a_prefix_is_followed_from_the_moment_it_was_routed() -> None:
    """The second request with a prompt goes where the first went, before any event; then by the events."""
    step = StepCoefficients(0.0, 0.1, 0.0)
    roomy = a_load(step=step, blocks_total=1000, blocks_free=1000)
    router = a_router(*(msgspec.structs.replace(roomy, replica_id=name) for name in "abcd"))
    prompt = tuple(bytes([i]) * 16 for i in range(40))
    home = routed(router.request(asking("q1", prompt_tokens=650, block_hashes=prompt), NOW))
    router.update(update("q1", home, "finished"), NOW)
    second = router.request(asking("q2", prompt_tokens=650, block_hashes=prompt), NOW)
    assert isinstance(second, Route) and (second.replica_id, second.matched_blocks) == (home, 40)
    router.update(update("q2", home, "finished"), NOW)
    later = NOW + 60.0
    elsewhere = next(name for name in "abcd" if name != home)
    assert router.replica_events(elsewhere, 1, BlockSnapshot(last_number=9, block_hashes=prompt), later)
    for name in "abcd":
        load = msgspec.structs.replace(roomy, replica_id=name, sequence=2)
        router.replica_reported(load, later)
    third = router.request(asking("q3", prompt_tokens=650, block_hashes=prompt), later)
    assert isinstance(third, Route) and (third.replica_id, third.matched_blocks) == (elsewhere, 40)


def test_a_replica_that_left_takes_its_prefixes_with_it() -> None:
    """Its row may be another replica's next: nothing of its cache is believed of that one."""
    router = a_router(a_load("a"))
    prompt = (b"x" * 16, b"y" * 16)
    router.replica_events("a", 1, BlockSnapshot(last_number=2, block_hashes=prompt), NOW)
    router.membership({"b"}, NOW)
    router.replica_reported(a_load("b"), NOW)
    route = router.request(asking("q", block_hashes=prompt), NOW)
    assert isinstance(route, Route) and (route.replica_id, route.matched_blocks) == ("b", 0)


def test_reservations_follow_the_answers_that_ended() -> None:
    """After some dozens of 20-token answers, 400 allowed ones reserve for about 20, not for 400."""
    router = a_router(a_load("a", blocks_total=10_000, blocks_free=10_000))
    before = router.request(asking("before", max_tokens=400), NOW)
    for i in range(60):
        routed(router.request(asking(f"q{i}", max_tokens=400), NOW))
        ended = msgspec.structs.replace(update(f"q{i}", "a", "finished"), output_tokens=20)
        router.update(ended, NOW)
    after = router.request(asking("after", max_tokens=400), NOW)
    assert isinstance(before, Route) and before.reserve_blocks == 10 + 25
    assert isinstance(after, Route) and 12 <= after.reserve_blocks <= 15


def test_a_route_says_up_to_what_backlog_it_is_the_best() -> None:
    """The other is 100 ms slower: beyond 1,000 tokens more, at 0.1 ms each, it would be the better one."""
    step = StepCoefficients(0.0, 0.1, 0.0)
    near = a_load("near", step=step, prefill_backlog_tokens=500)
    far = a_load("far", step=step, prefill_backlog_tokens=1500)
    route = a_router(near, far).request(asking("q"), NOW)
    assert isinstance(route, Route) and route.replica_id == "near"
    assert route.max_backlog_tokens is not None and 1500 <= route.max_backlog_tokens <= 1900
    alone = a_router(near).request(asking("q"), NOW)
    assert isinstance(alone, Route) and alone.max_backlog_tokens is None


def test_what_a_refuser_said_is_believed_at_once() -> None:
    """Busier than its report told, it loses the next pick; it is a candidate still, for it has room."""
    step = StepCoefficients(0.0, 0.1, 0.0)
    router = a_router(a_load("a", step=step), a_load("b", step=step, prefill_backlog_tokens=900))
    first = routed(router.request(asking("q"), NOW))
    assert first == "a"
    refusal = Refusal("a", 100, 5000)
    assert routed(router.request(asking("q", refusals=(refusal,)), NOW)) == "b"
    assert routed(router.request(asking("p"), NOW)) == "b"
    gone = Refusal("unknown", 1, 1)
    assert routed(router.request(asking("r", refusals=(gone,)), NOW)) == "b"


def test_a_refused_prompt_is_not_expected_in_the_refusers_cache() -> None:
    """It never ran there, so the next one like it has nothing to follow."""
    router = a_router(a_load("a"), a_load("b"))
    prompt = tuple(bytes([i]) * 16 for i in range(10))
    refuser = routed(router.request(asking("q", block_hashes=prompt), NOW))
    other = "b" if refuser == "a" else "a"
    assert routed(router.request(asking("q", block_hashes=prompt, refused_replicas=(refuser,)), NOW)) == other
    router.replica_reported(a_load(refuser, sequence=2), NOW)
    route = router.request(asking("p", block_hashes=prompt, refused_replicas=(other,)), NOW)
    assert isinstance(route, Route) and (route.replica_id, route.matched_blocks) == (refuser, 0)
    later = router.request(asking("r", block_hashes=prompt, refused_replicas=(refuser,)), NOW)
    assert isinstance(later, Route) and (later.replica_id, later.matched_blocks) == (other, 10)


def test_work_just_sent_is_not_worked_off_since_an_older_report() -> None:
    """Two seconds after their reports one of two idle replicas gets 1 s of work: the other is better."""
    step = StepCoefficients(0.0, 0.1, 0.0)
    roomy = a_load(step=step, blocks_total=2000, blocks_free=2000)
    router = a_router(*(msgspec.structs.replace(roomy, replica_id=name) for name in "ab"))
    later = NOW + 2.0
    first = routed(router.request(asking("q", prompt_tokens=10_000), later))
    second = router.request(asking("p", prompt_tokens=10_000, refused_replicas=("b",)), later)
    waited = 2000.0 if first == "a" else 1000.0
    assert isinstance(second, Route) and second.predicted_ms == pytest.approx(waited, rel=0.01)
    half_done = router.request(asking("r", prompt_tokens=10_000, refused_replicas=("b",)), later + 0.5)
    assert isinstance(half_done, Route) and half_done.predicted_ms == pytest.approx(waited + 500, rel=0.01)


def test_a_request_counts_once_however_often_it_was_picked_for() -> None:
    """Two refusals and an acceptance are one request of its region."""
    router = a_router(a_load("a"), a_load("b"))
    for _ in range(2):
        refuser = routed(router.request(asking("q"), NOW))
        routed(router.request(asking("q", refusals=(Refusal(refuser, 50, 9000),)), NOW))
    assert router.status(NOW).regions == {}
    home = routed(router.request(asking("q"), NOW))
    for _ in range(2):  # the news may come twice
        router.update(update("q", home, "accepted", submission=1), NOW)
    assert router.status(NOW).regions["us-east"].num_accepted == 1


def test_a_measured_round_trip_is_its_whole_regions_and_no_others() -> None:
    """75 ms were given for eu-west; forty answers within 5 ms say otherwise, of later replicas too."""
    step = StepCoefficients(0.0, 0.1, 0.0)
    router = a_router(a_load("near", step=step), a_load("far", step=step, region="eu-west"))

    def predicted_ms(name: str, region: str) -> float:
        route = router.request(asking(name, allowed_regions=(region,)), NOW)
        assert isinstance(route, Route)
        router.update(update(name, route.replica_id, "finished"), NOW)
        return route.predicted_ms

    before = predicted_ms("p", "eu-west")
    for i in range(40):
        routed(router.request(asking(f"q{i}", allowed_regions=("eu-west",)), NOW))
        router.update(msgspec.structs.replace(update(f"q{i}", "far", "accepted", i + 1), rtt_ms=5.0), NOW)
        router.update(update(f"q{i}", "far", "finished"), NOW)
    assert predicted_ms("r", "eu-west") == pytest.approx(before - 70.0, abs=0.1)
    assert predicted_ms("s", "us-east") == pytest.approx(before - 75.0, abs=0.1)
    router.membership({"near", "far", "new"}, NOW)
    router.replica_lost("far", NOW)
    router.replica_reported(a_load("new", step=step, region="eu-west"), NOW)
    assert predicted_ms("t", "eu-west") == pytest.approx(before - 70.0, abs=0.1)
    router.update(msgspec.structs.replace(update("t", "new", "accepted"), rtt_ms=1.0), NOW)
    assert predicted_ms("u", "eu-west") < before - 71.0
