"""One request's way, over the real links, to replicas and a Router in memory."""

import asyncio
import time

import pytest

from serving import generation
from serving.dispatcher import DispatcherLimits
from serving.errors import (
    ContextLengthExceeded,
    DeadlineExceeded,
    InternalError,
    ReplicaGone,
    ReplicaLost,
    ServerOverloaded,
)
from serving.generation import MAX_BUSY_REFUSALS
from serving.messages import Refusal, SequenceDelta
from tests.serving.fleet_fakes import FakeFleet, FakeReplica, eventually
from tests.serving.generation_cases import a_replica, generation_of, say_three, tokens_of


async def test_tokens_come_from_the_replica_and_the_router_hears_both_ends():
    """The Router is told accepted, then finished with the count of tokens, and holds nothing after."""
    a = a_replica("a")
    async with FakeFleet(a) as fleet:
        generation = generation_of(fleet.completions())
        assert await tokens_of(generation) == [7, 8, 9]
        await eventually(lambda: fleet.num_held == 0)
        assert fleet.router.outcomes("q") == [("accepted", "a"), ("finished", "a")]
        assert fleet.router.updates[-1].output_tokens == generation.output_tokens == 3
        assert a.submits[0].reserve_blocks == 14
        assert generation.finish_reason == "length" and a.aborts == []


async def test_a_refusal_leads_to_a_pick_without_the_refuser():
    """The second pick names the refuser, and the other replica serves the request."""
    a, b = a_replica("a"), a_replica("b")
    a.refuse()
    async with FakeFleet(a, b) as fleet:
        generation = generation_of(fleet.completions())
        assert await tokens_of(generation) == [7, 8, 9]
        assert [pick.refused_replicas for pick in fleet.router.picks] == [(), ("a",)]
        assert generation.route.replica_id == "b" and generation.refusals == 1


async def test_a_replica_busier_than_the_router_knew_sends_the_request_on():
    """Its figures reach the Router with the next question; it is not excluded, only seen as it is."""
    a, b = a_replica("a"), a_replica("b")
    a.be_busy()
    async with FakeFleet(a, b) as fleet:
        generation = generation_of(fleet.completions())
        assert await tokens_of(generation) == [7, 8, 9]
        first, second = fleet.router.picks
        assert first.refusals == () and second.refused_replicas == ()
        assert second.refusals == (Refusal("a", 100, 100_000),)
        assert a.submits[0].max_backlog_tokens is not None
        assert generation.route.replica_id == "b" and generation.refusals == 1


async def test_a_request_that_busy_replicas_keep_refusing_is_served_in_the_end():
    """After four such refusals it comes without a limit."""
    a, b = a_replica("a"), a_replica("b")
    a.be_busy()
    b.be_busy()
    async with FakeFleet(a, b) as fleet:
        generation = generation_of(fleet.completions())
        assert await tokens_of(generation) == [7, 8, 9]
        assert generation.refusals == MAX_BUSY_REFUSALS
        submits = [*a.submits, *b.submits]
        assert len(submits) == MAX_BUSY_REFUSALS + 1
        assert [submit.max_backlog_tokens for submit in submits].count(None) == 1


async def test_a_replica_that_does_not_answer_is_given_up(monkeypatch):
    """Stopped, not dead: another one serves; what the first accepts when it wakes up is aborted."""
    monkeypatch.setattr(generation, "SUBMIT_PATIENCE_S", 0.05)
    a, b = a_replica("a"), a_replica("b")
    a.gate.clear()
    async with FakeFleet(a, b) as fleet:
        served = generation_of(fleet.completions())
        assert await tokens_of(served) == [7, 8, 9]
        assert served.route.replica_id == "b"
        a.gate.set()
        await eventually(lambda: a.aborts == [a.submits[0].request_id])
        await eventually(lambda: fleet.num_held == 0)


async def test_refused_by_all_it_waits_and_is_served_when_there_is_room():
    """A refusal is never an error: the request queues until a report shows the room."""
    a, b = a_replica("a"), a_replica("b")
    a.refuse()
    b.refuse()
    async with FakeFleet(a, b) as fleet:
        generation = generation_of(fleet.completions())
        answer = asyncio.create_task(tokens_of(generation))
        await eventually(lambda: fleet.router.dispatcher.num_waiting == 1)
        fleet.router.know(a, b)
        assert await answer == [7, 8, 9]
        assert generation.refusals == 2


async def test_what_no_replica_can_ever_hold_is_the_clients_mistake():
    """Said by the Router or by the replica: 400, at once, and nothing stays on the Router's books."""
    a = a_replica("a", blocks=10)
    async with FakeFleet(a) as fleet:
        with pytest.raises(ContextLengthExceeded):
            await tokens_of(generation_of(fleet.completions(), "router's"))
        assert a.submits == []
        a.refuse(permanent=True)
        with pytest.raises(ContextLengthExceeded):
            await tokens_of(generation_of(fleet.completions(), "replica's", prompt_tokens=16))
        await eventually(lambda: fleet.num_held == 0)


async def test_a_full_queue_is_overload_with_a_time_to_retry():
    """No room and no place to wait: 503, with the seconds after which to come again."""
    a = FakeReplica("a", blocks=14)
    async with FakeFleet(a, limits=DispatcherLimits(max_waiting_requests=0)) as fleet:
        completions = fleet.completions()
        holder = asyncio.create_task(tokens_of(generation_of(completions, "holder")))
        await eventually(lambda: "holder" in a.running)
        with pytest.raises(ServerOverloaded) as overloaded:
            await tokens_of(generation_of(completions, "late"))
        assert overloaded.value.retry_after_s >= 1.0
        assert [pick.request_id for pick in fleet.router.picks] == ["holder", "late"]
        a.say("holder", 1, finish="stop")
        await holder


@pytest.mark.parametrize("stuck", ["in the queue", "at the replica", "without a router", "in mid-answer"])
async def test_nobody_waits_longer_than_the_deadline(stuck):
    """Whoever does not answer, the client is told 504 in time, and nothing goes on behind its back."""
    a = a_replica("a", blocks=20)
    async with FakeFleet(a) as fleet:
        if stuck == "in the queue":
            a.refuse(1000)
        elif stuck == "at the replica":
            a.gate.clear()
        elif stuck == "without a router":
            fleet.router.die()
        else:
            a.script = lambda submit: say_three(submit)[:1]
        started = time.monotonic()
        with pytest.raises(DeadlineExceeded):
            await tokens_of(generation_of(fleet.completions(timeout_s=0.1)))
        assert time.monotonic() - started < 1.0
        a.gate.set()
        await eventually(lambda: fleet.num_held == 0 and not a.running)


async def test_a_replica_that_dies_before_the_first_token_is_replaced():
    """Its request is asked for once more, without it, and the other replica answers."""
    a, b = FakeReplica("a"), a_replica("b")
    async with FakeFleet(a, b) as fleet:
        generation = generation_of(fleet.completions())
        answer = asyncio.create_task(tokens_of(generation))
        await eventually(lambda: a.running)
        a.die()
        assert await answer == [7, 8, 9]
        assert generation.route.replica_id == "b"
        await eventually(lambda: len(fleet.router.outcomes("q")) == 4)
        assert fleet.router.outcomes("q") == [
            ("accepted", "a"),
            ("lost", "a"),
            ("accepted", "b"),
            ("finished", "b"),
        ]


async def test_a_replica_that_dies_with_the_submit_in_hand_is_replaced():
    """Whether it had accepted cannot be known: nothing was seen of it, so it is asked for again."""
    a, b = FakeReplica("a"), a_replica("b")
    a.gate.clear()
    async with FakeFleet(a, b) as fleet:
        answer = asyncio.create_task(tokens_of(generation_of(fleet.completions())))
        await eventually(lambda: a.submits)
        a.die()
        assert await answer == [7, 8, 9]
        assert ("lost", "a") in fleet.router.outcomes("q")


async def test_a_replica_says_that_it_is_dying_before_its_stream_breaks():
    """A delta "lost" is as good as the broken stream, and no token of it reaches the client."""
    a, b = FakeReplica("a"), a_replica("b")
    async with FakeFleet(a, b) as fleet:
        generation = generation_of(fleet.completions())
        answer = asyncio.create_task(tokens_of(generation))
        await eventually(lambda: a.running)
        a.publish(SequenceDelta(request_id="q", finish_reason="lost", error="rank 1 died"))
        assert await answer == [7, 8, 9]
        assert generation.route.replica_id == "b"


async def test_each_attempt_has_an_id_of_its_own():
    """A replica thought dead may have accepted: it is told to end that, and what it says is not read."""
    a, b = FakeReplica("a"), FakeReplica("b")
    submit_to_a = a.submit

    async def accept_and_lose_the_answer(ingress_id: str, payload: bytes) -> bytes:
        await submit_to_a(ingress_id, payload)
        raise ReplicaGone("a")

    a.submit = accept_and_lose_the_answer  # type: ignore[method-assign]
    async with FakeFleet(a, b) as fleet:
        answer = asyncio.create_task(tokens_of(generation_of(fleet.completions())))
        await eventually(lambda: b.running)
        ((first,), (second,)) = a.submits, b.submits
        assert first.request_id != second.request_id
        a.say(first.request_id, 66)
        b.say(second.request_id, 7, finish="stop")
        assert await answer == [7]
        await eventually(lambda: a.aborts == [first.request_id] and fleet.num_held == 0)


async def test_an_abort_nobody_here_asked_for_is_a_lost_replica():
    """The replica let it go, whatever it thought of us: another one answers."""
    a, b = FakeReplica("a"), a_replica("b")
    async with FakeFleet(a, b) as fleet:
        answer = asyncio.create_task(tokens_of(generation_of(fleet.completions())))
        await eventually(lambda: a.running)
        a.publish(SequenceDelta(request_id="q", finish_reason="abort"))
        assert await answer == [7, 8, 9]


async def test_after_the_first_token_a_death_ends_the_request():
    """What was sent cannot be taken back: ReplicaLost, and no second replica computes it."""
    a, b = FakeReplica("a"), a_replica("b")
    async with FakeFleet(a, b) as fleet:
        seen: list[int] = []

        async def follow() -> None:
            async for delta in generation_of(fleet.completions()).run():
                seen.extend(delta.token_ids)

        answer = asyncio.create_task(follow())
        await eventually(lambda: a.running)
        a.say("q", 5)
        await eventually(lambda: seen)
        a.die()
        with pytest.raises(ReplicaLost):
            await answer
        assert seen == [5] and b.submits == []


async def test_a_request_whose_replicas_keep_dying_is_given_up():
    """It may be what kills them: after two deaths it ends, with a third replica unharmed."""
    replicas = [FakeReplica(name) for name in "abc"]
    async with FakeFleet(*replicas) as fleet:
        answer = asyncio.create_task(tokens_of(generation_of(fleet.completions())))
        for _ in range(2):
            await eventually(lambda: any(one.running and not one.dead for one in replicas))
            next(one for one in replicas if one.running and not one.dead).die()
        with pytest.raises(ReplicaLost):
            await answer
        assert sum(bool(one.submits) for one in replicas) == 2


async def test_an_engine_error_is_an_error_of_this_request_alone():
    """It is told as 500, settled as finished, and not aborted: the engine has ended it."""
    a = FakeReplica("a")
    async with FakeFleet(a) as fleet:
        answer = asyncio.create_task(tokens_of(generation_of(fleet.completions())))
        await eventually(lambda: a.running)
        a.publish(SequenceDelta(request_id="q", finish_reason="error", error="logits are not finite"))
        with pytest.raises(InternalError, match="not finite"):
            await answer
        await eventually(lambda: fleet.num_held == 0)
        assert fleet.router.outcomes("q") == [("accepted", "a"), ("finished", "a")] and a.aborts == []


async def test_a_new_router_is_asked_again_for_what_the_old_one_had_queued():
    """The queue is lost with the Router, the requests in it are not."""
    a = FakeReplica("a", blocks=20)
    async with FakeFleet(a) as fleet:
        completions = fleet.completions()
        holder = asyncio.create_task(tokens_of(generation_of(completions, "holder")))
        await eventually(lambda: "holder" in a.running)
        queued = asyncio.create_task(tokens_of(generation_of(completions, "queued")))
        await eventually(lambda: fleet.router.dispatcher.num_waiting == 1)
        fleet.router.die()
        a.say("holder", 1, finish="stop")
        assert await holder == [1]
        a.script = say_three
        fleet.router.start()
        fleet.router.know(a)
        assert await queued == [7, 8, 9]


async def test_a_route_to_a_replica_not_seen_here_yet_does_not_condemn_it():
    """The Router learns of a replica first: it is asked again, and not told that the replica is lost."""
    a = a_replica("a")
    async with FakeFleet(a) as fleet:
        late = a_replica("late", blocks=1000)
        a.blocks = 1
        fleet.router.know(a, late)
        answer = asyncio.create_task(tokens_of(generation_of(fleet.completions())))
        await eventually(lambda: fleet.router.dispatcher.num_waiting == 1)
        fleet.replicas.all["late"] = late
        fleet.replicas.members.add("late")
        await eventually(lambda: late.is_streaming)
        fleet.router.know(a, late)
        assert await answer == [7, 8, 9]
        await eventually(lambda: fleet.num_held == 0)
        assert fleet.router.outcomes("q") == [("accepted", "late"), ("finished", "late")]


async def test_many_requests_with_every_fate_leave_nothing_behind():
    """Served, refused, cancelled or with a dead replica: each ends, and all books are empty after."""
    a, b, c = (a_replica(name, blocks=60) for name in "abc")
    a.refuse(5)
    b.script = lambda submit: []
    async with FakeFleet(a, b, c) as fleet:
        completions = fleet.completions()
        tasks = [asyncio.create_task(tokens_of(generation_of(completions, f"q{n}"))) for n in range(30)]
        await eventually(lambda: b.running)
        for task in tasks[::5]:
            task.cancel()
        b.die()
        fleet.replicas.members.discard("b")
        fates: list[object] = []
        while any(not task.done() for task in tasks):
            fleet.router.know(a, c)
            await asyncio.sleep(0.01)
        fates = await asyncio.gather(*tasks, return_exceptions=True)
        unexpected = [
            fate for fate in fates if fate != [7, 8, 9] and not isinstance(fate, asyncio.CancelledError)
        ]
        assert unexpected == [] and fates.count([7, 8, 9]) >= 24
        await eventually(lambda: fleet.num_held == 0 and not a.running and not c.running)
