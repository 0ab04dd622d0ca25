"""A front door that asks no Router: it takes replicas' room while the Router believes it free.

    python rival_ingress.py RAY_ADDRESS DEPLOYMENT NUM_REPLICAS SECONDS RESERVE_BLOCKS

Towards each replica it submits a request that reserves so many blocks, follows it to its end, and at
once submits the next. So a load report that shows the room between two of them is always out of date
when somebody acts on it, as with a second Router whose view is stale. Prints one JSON object: how many
were accepted and refused, and how the accepted ones ended.
"""

import asyncio
import json
import sys
import time
from collections import Counter

import ray

from serving.deploy import APPLICATION
from serving.links import ReplicaLink
from serving.messages import Accepted, SamplingParams, Submit
from serving.ray_compat import PinnedHandle
from serving.transport import DelayLine

RETRY_S = 0.03


def submission(number: int, reserve_blocks: int) -> Submit:
    return Submit(
        request_id=f"rival-{number}",
        token_ids=tuple(range(number * 100, number * 100 + 20)),
        sampling=SamplingParams(max_tokens=4),
        reserve_blocks=reserve_blocks,
        hash_root=b"rival".ljust(16),
    )


async def compete(link: ReplicaLink, first: int, seconds: float, reserve_blocks: int) -> Counter:
    found: Counter = Counter()
    until = time.time() + seconds
    number = first
    while time.time() < until:
        submit = submission(number, reserve_blocks)
        number += 1
        accepted = isinstance(await link.submit(submit), Accepted)
        found["accepted" if accepted else "refused"] += 1
        if not accepted:
            await asyncio.sleep(RETRY_S)
        else:
            async for batch in link.deltas(submit.request_id, until_s=until + 30):
                found.update(delta.finish_reason for delta in batch if delta.finish_reason)
                if batch[-1].finish_reason:
                    break
        link.release(submit.request_id, abort=False)
    link.close()
    return found


async def main(deployment: str, num_replicas: int, seconds: float, reserve_blocks: int) -> None:
    replicas = PinnedHandle(deployment, APPLICATION)
    while len(replicas.running()) < num_replicas:  # noqa: ASYNC110 (Serve tells nobody when the set changes)
        await asyncio.sleep(0.05)
    print("ready", flush=True)
    links = [ReplicaLink(replicas, name, "rival", DelayLine(0)) for name in sorted(replicas.running())]
    found = await asyncio.gather(
        *(compete(link, 1000 * at, seconds, reserve_blocks) for at, link in enumerate(links))
    )
    print(json.dumps(sum(found, Counter())))


if __name__ == "__main__":
    ray.init(address=sys.argv[1], namespace="searoom", log_to_driver=False)
    asyncio.run(main(sys.argv[2], int(sys.argv[3]), float(sys.argv[4]), int(sys.argv[5])))
