"""Requests in real time: a rehearsal that keeps the replicas busy, and a run as clients would have it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import cycle

import msgspec

from serving.bench.router.calibration_fleet import LocalRouter, PipedReplicas
from serving.bench.router.calibration_load import INGRESS, RealRequest
from serving.errors import ApiError, ReplicaGone, SearoomError
from serving.generation import Generation
from serving.links import ReplicaLink, ReplicaLinks
from serving.messages import Accepted
from serving.router_link import RouterLink
from serving.simulator import Policy
from serving.simulator.routers import TICK_S
from serving.transport import DelayLine

DEADLINE_S = 600.0
POLL_S = 0.01
START_S = 10.0  # for every replica to have reported


@dataclass(frozen=True, slots=True)
class Served:
    """What became of a request. Seconds from the run's start; None of what did not happen."""

    arrival_s: float
    picked_s: float
    accepted_s: float
    first_token_s: float | None
    ended_s: float
    output_tokens: int
    cached_tokens: int
    refusals: int
    was_queued: bool  # by the Router
    failure: str | None = None


async def rehearse(
    replicas: PipedReplicas, requests: Sequence[RealRequest], seconds: float, widths: Sequence[int]
) -> float:
    """Keep all replicas busy at the same time, each with as many requests as the widths say, in turn.

    Every replica has each width for an equal part of the time, and another one than its neighbour.
    Returns the median seconds from a submit to its answer.
    """
    await replicas.follow(requests)
    line = cycle(requests)
    links = _links(replicas)
    answers_s: list[float] = []
    try:
        await _attached(links, replicas)
        until_s = time.monotonic() + seconds
        await asyncio.gather(
            *(
                _press(
                    links.get(name),
                    line,
                    [*widths[number:], *widths[:number]],
                    seconds / len(widths),
                    until_s,
                    answers_s,
                )
                for number, name in enumerate(sorted(replicas.pipes))
            )
        )
    finally:
        links.close()
    return sorted(answers_s)[len(answers_s) // 2]


async def _press(
    link: ReplicaLink,
    line: cycle[RealRequest],
    widths: Sequence[int],
    each_s: float,
    until_s: float,
    answers_s: list[float],
) -> None:
    """One replica's rehearsal."""
    running: set[asyncio.Task[float]] = set()
    number = 0
    while (left_s := until_s - time.monotonic()) > 0:
        width = widths[min(len(widths) - 1, int(len(widths) - left_s / each_s))]
        while len(running) < width:
            number += 1
            running.add(asyncio.create_task(_follow_one(link, next(line), f"rehearsal {number}")))
        done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
        answers_s += [task.result() for task in done]
    answers_s += await asyncio.gather(*running)


async def _follow_one(link: ReplicaLink, request: RealRequest, request_id: str) -> float:
    """Only queued there, whatever the room; returns the seconds until it was."""
    started_s = time.perf_counter()
    reply = await link.submit(msgspec.structs.replace(request.submit, request_id=request_id))
    answer_s = time.perf_counter() - started_s
    if not isinstance(reply, Accepted):
        raise SearoomError(f"a replica refused a request of the rehearsal: {reply.why}")
    async for batch in link.deltas(request_id, until_s=time.time() + DEADLINE_S):
        if any(delta.finish_reason is not None for delta in batch):
            break
    link.release(request_id, abort=False)
    return answer_s


async def play(
    replicas: PipedReplicas,
    policy: Policy,
    requests: Sequence[RealRequest],
    on_progress: Callable[[int], None] = lambda ended: None,
) -> list[Served]:
    """Every request at its arrival, in real time; what became of each, in their order."""
    await replicas.follow(requests)
    router = replicas.router = LocalRouter(policy, replicas)
    router_link = RouterLink(router, INGRESS)
    links = _links(replicas)
    try:
        await _attached(links, replicas)
        async with asyncio.timeout(START_S):
            await router.has_heard_all.wait()
        run = _Run(router, router_link, links, on_progress)
        async with asyncio.TaskGroup() as group:
            for request in requests:
                due_s = run.start_s + request.simulated.arrival_s
                await asyncio.sleep(max(0.0, due_s - time.time()))
                run.served.append(group.create_task(run.serve(request, due_s)))
    finally:
        replicas.router = None
        links.close()
        router_link.close()
        router.background.close()
    router.background.check()
    return [task.result() for task in run.served]


class _Run:
    """Requests under way, and who has ended."""

    def __init__(
        self, asked: LocalRouter, router: RouterLink, links: ReplicaLinks, on_progress: Callable[[int], None]
    ) -> None:
        self.start_s = time.time() + TICK_S
        self.served: list[asyncio.Task[Served]] = []
        self._asked = asked
        self._router = router
        self._links = links
        self._on_progress = on_progress
        self._num_ended = 0

    async def serve(self, request: RealRequest, due_s: float) -> Served:
        route = msgspec.structs.replace(request.route, ingress_id=INGRESS, deadline_s=due_s + DEADLINE_S)
        generation = Generation(route, request.submit, self._router, self._links)
        failure: str | None = None
        try:
            async for _ in generation.run():
                pass
        except ApiError as error:
            failure = str(error)
        self._num_ended += 1
        self._on_progress(self._num_ended)
        times, start_s = generation.times, self.start_s
        return Served(
            arrival_s=due_s - start_s,
            picked_s=times.picked_s - start_s,
            accepted_s=times.accepted_s - start_s,
            first_token_s=times.first_token_s - start_s if times.first_token_s else None,
            ended_s=times.ended_s - start_s,
            output_tokens=generation.output_tokens,
            cached_tokens=times.sequence.cached_tokens if times.sequence else 0,
            refusals=generation.refusals,
            was_queued=route.request_id in self._asked.queued,
            failure=failure,
        )


def _links(replicas: PipedReplicas) -> ReplicaLinks:
    return ReplicaLinks({"replicas": (replicas, DelayLine(0.0))}, INGRESS, lambda name: None)


async def _attached(links: ReplicaLinks, replicas: PipedReplicas) -> None:
    """Wait until every replica's stream of frames is open."""
    for name in replicas.running():
        while True:
            with suppress(ReplicaGone):
                if links.get(name).is_attached:
                    break
            await asyncio.sleep(POLL_S)
