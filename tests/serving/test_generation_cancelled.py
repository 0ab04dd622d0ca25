"""Clients that leave before their answer is whole: nothing goes on behind their backs."""

import asyncio
from contextlib import aclosing

import pytest

from tests.serving.fleet_fakes import FakeFleet, FakeReplica, eventually
from tests.serving.generation_cases import generation_of, tokens_of


async def test_closing_early_aborts_on_the_replica_and_settles_once():
    """The replica is told once to end it, the Router once that it ended."""
    a = FakeReplica("a")
    async with FakeFleet(a) as fleet:
        async with aclosing(generation_of(fleet.completions()).run()) as deltas:
            first = asyncio.ensure_future(anext(deltas))
            await eventually(lambda: a.running)
            a.say("q", 5)
            assert (await first).token_ids == (5,)
        await eventually(lambda: a.aborts and fleet.num_held == 0)
        assert a.aborts == ["q"] and not a.running
        assert fleet.router.outcomes("q") == [("accepted", "a"), ("finished", "a")]


async def cancel(task: asyncio.Task) -> None:
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_cancelled_in_the_queue_it_leaves_the_queue():
    """The Router is told once, so that it does not hold the room for somebody who has gone."""
    a = FakeReplica("a", blocks=20)
    async with FakeFleet(a) as fleet:
        completions = fleet.completions()
        holder = asyncio.create_task(tokens_of(generation_of(completions, "holder")))
        await eventually(lambda: "holder" in a.running)
        leaver = asyncio.create_task(tokens_of(generation_of(completions, "leaver")))
        await eventually(lambda: fleet.router.dispatcher.num_waiting == 1)
        await cancel(leaver)
        await eventually(lambda: fleet.router.dispatcher.num_waiting == 0)
        picks = [pick for pick in fleet.router.picks if pick.request_id == "leaver"]
        assert len(picks) == 2 and fleet.router.outcomes("leaver") == []
        a.say("holder", 1, finish="stop")
        await holder
        assert [submit.request_id for submit in a.submits] == ["holder"]


async def test_cancelled_while_the_route_is_on_its_way_it_is_forgotten():
    """The Router has counted its blocks already; the replica never hears of it."""
    a = FakeReplica("a")
    async with FakeFleet(a) as fleet:
        fleet.router.gate.clear()
        leaver = asyncio.create_task(tokens_of(generation_of(fleet.completions())))
        await eventually(lambda: fleet.num_held == 1)
        await cancel(leaver)
        fleet.router.gate.set()
        await eventually(lambda: fleet.num_held == 0)
        assert a.submits == []


@pytest.mark.parametrize("where", ["before it decides", "after it decided"])
async def test_cancelled_between_route_and_accepted_the_replica_ends_it(where):
    """The abort goes out after the answer, so it cannot overtake the submit; the Router forgets it."""
    a = FakeReplica("a")
    gate = a.gate if where == "before it decides" else a.answering
    gate.clear()
    async with FakeFleet(a) as fleet:
        leaver = asyncio.create_task(tokens_of(generation_of(fleet.completions())))
        await eventually(lambda: a.submits)
        await cancel(leaver)
        await asyncio.sleep(0.01)
        assert a.aborts == []
        gate.set()
        await eventually(lambda: a.aborts == ["q"] and not a.running and fleet.num_held == 0)


async def test_cancelled_between_route_and_refused_there_is_nothing_to_end():
    """A refused request is not on the replica, so no abort is sent."""
    a = FakeReplica("a")
    a.refuse()
    a.gate.clear()
    async with FakeFleet(a) as fleet:
        leaver = asyncio.create_task(tokens_of(generation_of(fleet.completions())))
        await eventually(lambda: a.submits)
        await cancel(leaver)
        a.gate.set()
        await eventually(lambda: fleet.num_held == 0)
        await asyncio.sleep(0.01)
        assert a.aborts == []


async def test_cancelled_behind_anothers_call_only_its_own_request_ends():
    """Requests share calls; the one that leaves takes nothing of the others with it."""
    a = FakeReplica("a")
    a.gate.clear()
    async with FakeFleet(a) as fleet:
        completions = fleet.completions()
        tasks = {
            name: asyncio.create_task(tokens_of(generation_of(completions, name)))
            for name in ("first", "leaver", "last")
        }
        await eventually(lambda: a.submits)
        await cancel(tasks["leaver"])
        a.gate.set()
        await eventually(lambda: set(a.running) == {"first", "last"} and a.aborts == ["leaver"])
        for name in ("first", "last"):
            a.say(name, 3, finish="stop")
            assert await tasks[name] == [3]
