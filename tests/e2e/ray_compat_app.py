"""A little Serve application that tries ray_compat from inside a replica, and prints what it found."""

import asyncio
import json
import os
import sys
import time

import ray
from ray import serve
from ray.serve.config import RequestRouterConfig

from serving.errors import ReplicaGone
from serving.ray_compat import PINNED_ROUTER, PinnedHandle, replica_id


class Worker:
    async def __init__(self):
        self.id = replica_id()
        self.open_streams = 0

    async def who(self):
        return self.id, os.getpid(), self.open_streams

    async def hang(self):
        await asyncio.sleep(60)

    async def ticks(self):
        self.open_streams += 1
        try:
            while True:
                yield self.id
                await asyncio.sleep(0.02)
        finally:
            self.open_streams -= 1


async def outcome(awaitable):
    try:
        await awaitable
    except ReplicaGone as gone:
        return type(gone).__name__
    return "no error"


async def until(condition):
    while not condition():  # noqa: ASYNC110 (Serve tells nobody when the set changes)
        await asyncio.sleep(0.05)


class Prober:
    async def __init__(self, workers):
        self.handle = PinnedHandle("Worker", "compat")

    async def probe(self):
        handle, found = self.handle, {}
        await until(lambda: len(handle.running()) == 2)
        first, second = found["running"] = sorted(handle.running())
        found["answers"] = {
            name: sorted({(await handle.call(name, "who"))[0] for _ in range(20)}) for name in (first, second)
        }
        stream = handle.stream(first, "ticks")
        found["stream_from"] = await anext(stream)
        await stream.aclose()
        await asyncio.sleep(0.5)
        found["stream_closed"] = (await handle.call(first, "who"))[2] == 0
        found["unknown"] = await asyncio.wait_for(outcome(handle.call("nobody", "who")), 5)

        async def drain():
            async for _ in handle.stream(second, "ticks"):
                pass

        pid = (await handle.call(second, "who"))[1]
        waits = [
            asyncio.create_task(outcome(drain())),
            asyncio.create_task(outcome(handle.call(second, "hang"))),
        ]
        await asyncio.sleep(0.5)
        killed = time.monotonic()
        os.kill(pid, 9)
        found["dead_stream"], found["dead_call"] = await asyncio.gather(*waits)
        found["call_after"] = await asyncio.wait_for(outcome(handle.call(second, "who")), 5)
        found["death_seen_s"] = time.monotonic() - killed
        await until(lambda: second not in handle.running() and len(handle.running()) == 2)
        found["replaced"] = first in handle.running()
        return found


def main():
    ray.init(address=sys.argv[1], log_to_driver=False)
    worker = serve.deployment(Worker).options(
        num_replicas=2,
        ray_actor_options={"num_cpus": 0.1},
        max_ongoing_requests=1000,
        request_router_config=RequestRouterConfig(request_router_class=PINNED_ROUTER),
        health_check_period_s=2,
    )
    prober = serve.deployment(Prober).options(ray_actor_options={"num_cpus": 0.1})
    handle = serve.run(prober.bind(worker.bind()), name="compat", route_prefix=None)
    print(json.dumps(handle.probe.remote().result(timeout_s=60)))


if __name__ == "__main__":
    main()
