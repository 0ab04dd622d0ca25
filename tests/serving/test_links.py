"""An Ingress's links: one stream a replica, kept in step with Serve's running set and with deaths."""

import asyncio
import gc
import time
from contextlib import aclosing
from contextvars import ContextVar

import pytest

from serving.errors import ReplicaGone
from serving.links import RECONNECT_S, ReplicaLinks
from serving.messages import Accepted, Route, SamplingParams, Submit
from serving.transport import DelayLine
from tests.serving.fleet_fakes import INGRESS, FakeFleet, FakeReplica, FakeReplicas, eventually
from tests.serving.generation_cases import generation_of
from tests.serving.routing_cases import a_request

CLIENT: ContextVar[str] = ContextVar("CLIENT", default="nobody")


def a_submit(request_id: str = "q") -> Submit:
    return Submit(
        request_id=request_id,
        token_ids=(1, 2, 3),
        sampling=SamplingParams(max_tokens=4),
        reserve_blocks=1,
        hash_root=b"root",
    )


def a_route_request(request_id: str = "q"):
    return a_request(request_id=request_id, ingress_id=INGRESS, deadline_s=time.time() + 60)


async def test_a_replica_that_joins_gets_a_stream_before_it_is_needed():
    """A death is then seen at once, also by an Ingress with no request there."""
    a, late = FakeReplica("a"), FakeReplica("late")
    async with FakeFleet(a) as fleet:
        with pytest.raises(ReplicaGone):
            fleet.links.get("late")
        fleet.replicas.all["late"] = late
        fleet.replicas.members.add("late")
        await eventually(lambda: late.is_streaming)
        assert fleet.links.get("late").replica_id == "late"
        late.die()
        await eventually(lambda: fleet.lost == ["late"])


async def test_a_replica_that_leaves_gets_no_new_work_and_keeps_its_stream_to_the_last_request():
    """A drain ends when the last stream does: neither before its last token nor after."""
    a = FakeReplica("a")
    async with FakeFleet(a) as fleet:
        link = fleet.links.get("a")
        assert isinstance(await link.submit(a_submit()), Accepted)
        fleet.replicas.members.clear()
        with pytest.raises(ReplicaGone):
            for n in range(1000):  # until the links have seen that it left
                await link.submit(a_submit(f"probe-{n}"))
                link.release(f"probe-{n}", abort=False)
                await asyncio.sleep(0.01)
        a.say("q", 5)
        news = link.deltas("q", until_s=time.time() + 60)
        assert (await anext(news))[0].token_ids == (5,)
        assert a.is_streaming
        link.release("q", abort=False)
        await eventually(lambda: not a.is_streaming)
        assert not fleet.links.any_attached and fleet.lost == []


async def test_a_leaving_replica_still_gets_the_abort_of_its_last_request():
    """The stream closes after the abort went out, so the drain does not wait for an unread request."""
    a = FakeReplica("a")
    async with FakeFleet(a) as fleet:
        link = fleet.links.get("a")
        await link.submit(a_submit())
        fleet.replicas.members.clear()
        link.leave()
        link.release("q", abort=True)
        await eventually(lambda: not a.is_streaming)
        assert a.aborts == ["q"]


async def test_a_submit_that_failed_does_not_keep_a_leaving_replicas_stream_open():
    """A call can fail where the stream does not; its request is gone from the link all the same."""
    a = FakeReplica("a")

    async def unreachable(ingress_id: str, payload: bytes) -> bytes:
        raise ReplicaGone("a")

    a.submit = unreachable  # type: ignore[method-assign]
    async with FakeFleet(a) as fleet:
        link = fleet.links.get("a")
        with pytest.raises(ReplicaGone):
            await link.submit(a_submit())
        fleet.replicas.members.clear()
        await eventually(lambda: not a.is_streaming)


async def test_a_death_ends_the_news_and_is_told_once():
    """The request's news end without a finish reason, and who cares is told, not at every look."""
    a = FakeReplica("a")
    async with FakeFleet(a) as fleet:
        link = fleet.links.get("a")
        await link.submit(a_submit())
        a.say("q", 5)
        news = link.deltas("q", until_s=time.time() + 60)
        assert (await anext(news))[0].token_ids == (5,)
        a.die()
        assert [batch async for batch in news] == []
        with pytest.raises(ReplicaGone):
            await link.submit(a_submit("next"))
        await eventually(lambda: fleet.lost)
        fleet.replicas.members.clear()  # now Serve has noticed too
        await asyncio.sleep(0.15)
        assert fleet.lost == ["a"]


async def test_news_end_at_the_time_that_was_given():
    """A reply that stalls is not waited for without end."""
    a = FakeReplica("a")
    async with FakeFleet(a) as fleet:
        link = fleet.links.get("a")
        await link.submit(a_submit())
        news = link.deltas("q", until_s=time.time() + 0.05)
        assert [batch async for batch in news] == [] and not link.gone.is_set()


async def test_a_broken_connection_to_a_living_replica_is_made_again():
    """It is taken for dead, said so, and linked again after a while if Serve still lists it."""
    a = FakeReplica("a")
    async with FakeFleet(a) as fleet:
        a.die()
        await eventually(lambda: fleet.lost == ["a"])
        back = fleet.replicas.all["a"] = FakeReplica("a")
        started = time.monotonic()
        await eventually(lambda: back.is_streaming)
        assert time.monotonic() - started > RECONNECT_S / 2
        assert isinstance(await fleet.links.get("a").submit(a_submit()), Accepted)


@pytest.mark.parametrize("dies", [False, True])
async def test_a_submit_waits_for_the_stream_and_a_death_ends_the_wait(dies):
    """Accepted without a stream, its first tokens would have nowhere to go."""
    a = FakeReplica("a")
    attach = asyncio.Event()

    async def slow_frames(ingress_id: str):
        await attach.wait()
        if dies:
            raise ReplicaGone("a")
        async for item in frames(ingress_id):
            yield item

    frames, a.frames = a.frames, slow_frames  # type: ignore[method-assign]
    links = ReplicaLinks({"us-east": (FakeReplicas([a]), DelayLine(0.0))}, INGRESS, lambda lost: None)
    await asyncio.sleep(0.01)
    link = links.get("a")
    waiting = [asyncio.create_task(link.submit(a_submit(f"q{n}"))) for n in range(3)]
    await asyncio.sleep(0.01)
    assert a.submits == []
    waiting[0].cancel()
    attach.set()
    answers = await asyncio.wait_for(asyncio.gather(*waiting, return_exceptions=True), 3.0)
    kinds = [type(answer) for answer in answers]
    assert kinds == [asyncio.CancelledError, *[ReplicaGone if dies else Accepted] * 2]
    assert [submit.request_id for submit in a.submits] == ([] if dies else ["q1", "q2"])
    links.close()


async def test_coalesced_calls_run_in_no_clients_context():
    """Serve cancels the calls made in a client's context when it leaves; these carry others' too."""
    a = FakeReplica("a")
    seen: dict[str, str] = {}
    async with FakeFleet(a) as fleet:
        call_replica, call_router = fleet.replicas.call, fleet.router.call

        async def replica_call(replica_id: str, method: str, *args: object) -> bytes:
            seen[method] = CLIENT.get()
            return await call_replica(replica_id, method, *args)

        async def router_call(method: str, *args: object) -> bytes:
            seen[method] = CLIENT.get()
            return await call_router(method, *args)

        fleet.replicas.call, fleet.router.call = replica_call, router_call  # type: ignore[method-assign]

        async def client() -> None:
            CLIENT.set("somebody")
            async with aclosing(generation_of(fleet.completions()).run()) as deltas:
                await anext(deltas)

        task = asyncio.create_task(client())
        await eventually(lambda: a.running)
        a.say("q", 1)
        await task
        await eventually(lambda: len(seen) == 4)
        assert seen == dict.fromkeys(("pick", "submit", "update", "abort"), "nobody")


async def test_a_pick_under_way_when_the_router_dies_fails_once_and_quietly():
    """Its caller asks again; nothing is left behind that the event loop complains of."""
    complaints: list[str] = []
    asyncio.get_running_loop().set_exception_handler(
        lambda loop, context: complaints.append(context["message"])
    )
    a = FakeReplica("a")
    async with FakeFleet(a) as fleet:
        router = fleet.router
        router.gate.clear()
        pick = asyncio.create_task(fleet.router_link.pick(a_route_request()))
        await eventually(lambda: router.picks)
        router.die()
        await asyncio.sleep(0.01)
        router.gate.set()
        await asyncio.wait([pick])
        assert type(pick.exception()) is ReplicaGone
        del pick
        router.start()
        router.know(a)
        assert isinstance(await fleet.router_link.pick(a_route_request("again")), Route)
    await asyncio.sleep(0.01)
    del fleet
    gc.collect()  # where the event loop finds an error that nobody took
    assert complaints == []
