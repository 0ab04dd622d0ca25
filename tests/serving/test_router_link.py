"""What an Ingress tells the Router: together where nobody waits, at once where somebody is misled."""

import asyncio
import time

from serving.messages import DispatchUpdate, Route
from serving.router_link import TELL_S
from tests.serving.fleet_fakes import INGRESS, FakeFleet, FakeReplica, eventually
from tests.serving.routing_cases import a_request


def update(number: int, outcome="finished") -> DispatchUpdate:
    return DispatchUpdate(request_id=f"q{number}", replica_id="a", outcome=outcome)


def count_calls(fleet: FakeFleet) -> list[int]:
    """The number of updates in each call, as they come."""
    calls: list[int] = []
    take = fleet.router.update

    async def counted(payload: bytes) -> bytes:
        before = len(fleet.router.updates)
        reply = await take(payload)
        calls.append(len(fleet.router.updates) - before)
        return reply

    fleet.router.update = counted  # type: ignore[method-assign]
    return calls


async def test_what_became_of_routes_is_told_together():
    """All that is said within a moment is one call, in the order it was said in."""
    async with FakeFleet(FakeReplica("a")) as fleet:
        calls = count_calls(fleet)
        for number in range(30):
            fleet.router_link.tell(update(number))
        await eventually(lambda: calls)
        assert calls == [30]
        assert [one.request_id for one in fleet.router.updates] == [f"q{n}" for n in range(30)]


async def test_a_loss_is_told_at_once_with_what_came_before_it():
    """The Router must not pick what is dead; the next update waits for its own moment again."""
    async with FakeFleet(FakeReplica("a")) as fleet:
        calls = count_calls(fleet)
        fleet.router_link.tell(update(1, "accepted"))
        fleet.router_link.tell(update(1, "lost"))
        begun = time.perf_counter()
        for _ in range(5):
            await asyncio.sleep(0)
        assert calls == [2] and time.perf_counter() - begun < TELL_S
        fleet.router_link.tell(update(2))
        await eventually(lambda: calls == [2, 1])


async def test_a_pick_does_not_wait_for_what_is_told():
    """They go ways of their own."""
    async with FakeFleet(FakeReplica("a")) as fleet:
        fleet.router_link.tell(update(1))
        request = a_request(request_id="q", ingress_id=INGRESS, deadline_s=time.time() + 60)
        assert isinstance(await fleet.router_link.pick(request), Route)
        assert fleet.router.updates == []
        await eventually(lambda: fleet.router.updates)
