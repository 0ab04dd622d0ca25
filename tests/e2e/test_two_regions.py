"""Two pretend regions: routing, round trips, and the deaths of every kind of process."""

import asyncio
import time

import httpx
import openai
import pytest
from clusters import eventually

STORY = [{"role": "user", "content": "Tell me a long story."}]


def loads(up):
    return {replica["load"]["region"]: replica for replica in up.status()["replicas"]}


def all_serve(up):
    """Both regions have a replica that reports, with nothing in flight."""
    try:
        status = up.status()
    except (httpx.HTTPError, ValueError, KeyError):
        return False
    replicas = status.get("replicas", [])
    return len(replicas) == 2 and all(
        replica["state"] == "fresh" and replica["num_in_flight"] == 0 for replica in replicas
    )


@pytest.fixture
def up(two_regions):
    """The two-region cluster, whole and idle before the test and after it."""
    eventually(lambda: all_serve(two_regions), timeout_s=60)
    yield two_regions
    eventually(lambda: all_serve(two_regions), timeout_s=60)


async def ask(client, up, number=0, max_tokens=24, **options):
    messages = [{"role": "user", "content": f"Tell me story number {number}."}]
    stream = await client.chat.completions.create(
        model=up.model,
        messages=messages,
        temperature=0,
        max_tokens=max_tokens,
        stream=True,
        extra_body={"ignore_eos": True},
        **options,
    )
    return [chunk async for chunk in stream]


async def test_thirty_two_chats_use_both_regions(up):
    """32 concurrent chats all finish; status shows that both regions took part."""
    before = {region: replica["load"]["last_submission"] for region, replica in loads(up).items()}
    client = up.async_client(timeout=300)
    chats = await asyncio.gather(*(ask(client, up, number) for number in range(32)))
    assert all(chunks[-1].choices[0].finish_reason == "length" for chunks in chats)
    after = {region: replica["load"]["last_submission"] for region, replica in loads(up).items()}
    assert sorted(after) == ["eu-west", "us-east"]
    assert all(after[region] > before[region] for region in after)
    assert sum(after.values()) - sum(before.values()) == 32


def test_a_lone_request_stays_at_home_and_the_round_trip_is_known(up):
    """With both idle the nearer region wins: the far one's round trip is in the score."""
    before = loads(up)["eu-west"]["load"]["last_submission"]
    for _ in range(3):
        up.client().chat.completions.create(model=up.model, messages=STORY, max_tokens=2)
    now = loads(up)
    assert now["eu-west"]["load"]["last_submission"] == before
    assert now["eu-west"]["rtt_ms"] > 50 > now["us-east"]["rtt_ms"]  # as measured, calls and all


async def test_a_killed_replica_is_avoided_at_once_and_comes_back(up):
    """kill -9 of the home replica: its streams end with an error within 2 s, new requests go to the
    other region within 1 s, and Serve brings a replica back without a hand.
    """
    client = up.async_client(timeout=60)
    victim = next(p for p in up.processes("ModelReplica") if "us-east" in " ".join(p.cmdline()))
    old_id = loads(up)["us-east"]["load"]["replica_id"]
    stream = await client.chat.completions.create(
        model=up.model, messages=STORY, stream=True, max_tokens=1500, extra_body={"ignore_eos": True}
    )
    await anext(aiter(stream))
    victim.kill()
    killed = time.monotonic()
    with pytest.raises(openai.APIError, match="died"):
        async for _ in stream:
            pass
    assert time.monotonic() - killed < 2
    await asyncio.sleep(max(0, killed + 1 - time.monotonic()))
    chunks = await ask(client, up, max_tokens=4)
    assert chunks[-1].choices[0].finish_reason == "length"
    eventually(lambda: all_serve(up) and loads(up)["us-east"]["load"]["replica_id"] != old_id, timeout_s=60)


async def test_a_killed_rank_ends_its_streams_and_is_replaced(up):
    """kill -9 of rank 0: error event within 2 s, the other region goes on, the group is replaced."""
    client = up.async_client(timeout=60)
    old = {region: replica["load"]["replica_id"] for region, replica in loads(up).items()}

    async def begin(number):
        # Eight of these need more blocks than one region has, so both get some; and they last for seconds.
        prompt = f"{number} " + "word " * 250
        stream = await client.completions.create(
            model=up.model, prompt=prompt, stream=True, max_tokens=1000, extra_body={"ignore_eos": True}
        )
        await anext(aiter(stream))
        return stream

    streams = await asyncio.gather(*(begin(number) for number in range(8)))
    in_flight = {region: replica["num_in_flight"] for region, replica in loads(up).items()}
    assert all(in_flight.values()), f"both regions must have streams: {in_flight}"
    ranks = up.processes("ray::Rank")
    assert len(ranks) == 2
    ranks[0].kill()
    killed = time.monotonic()

    async def end_of(stream):
        try:
            async for _ in stream:
                pass
        except openai.APIError:
            assert time.monotonic() - killed < 2
            return "error"
        return "whole"

    ends = await asyncio.gather(*(end_of(stream) for stream in streams))
    assert sorted(set(ends)) == ["error", "whole"]
    assert ends.count("error") in in_flight.values()

    def replaced():
        now = {region: replica["load"]["replica_id"] for region, replica in loads(up).items()}
        return all_serve(up) and sum(now[region] != old[region] for region in old) == 1

    eventually(replaced, timeout_s=60)


async def test_requests_without_a_token_yet_survive_a_death(up):
    """Requests that wait for their first token on a replica that dies are served by the other."""
    client = up.async_client(timeout=120)
    prompt = "word " * 600

    async def long_prompt(number):
        reply = await client.completions.create(
            model=up.model, prompt=f"{number} {prompt}", max_tokens=2, temperature=0
        )
        return reply.choices[0].finish_reason

    asks = [asyncio.create_task(long_prompt(number)) for number in range(4)]
    await asyncio.sleep(0.5)
    for process in up.processes("ModelReplica"):
        if "us-east" in " ".join(process.cmdline()):
            process.kill()
    assert set(await asyncio.gather(*asks)) <= {"length", "stop"}


async def test_a_killed_ingress_frees_what_it_had(up):
    """kill -9 of Ingress: replicas abort its requests, and a new Ingress serves."""
    client = up.async_client(timeout=60)
    stream = await client.chat.completions.create(
        model=up.model, messages=STORY, stream=True, max_tokens=1500, extra_body={"ignore_eos": True}
    )
    await anext(aiter(stream))
    (ingress,) = up.processes(":Ingress")
    ingress.kill()
    with pytest.raises((openai.APIError, httpx.HTTPError)):
        async for _ in stream:
            pass

    def idle():
        return all_serve(up) and all(
            replica["load"]["num_running"] + replica["load"]["blocks_reserved"] == 0
            for replica in up.status()["replicas"]
        )

    eventually(idle, timeout_s=60)
    assert (await ask(client, up, max_tokens=2))[-1].choices[0].finish_reason == "length"


async def test_a_killed_router_costs_no_accepted_request(up):
    """kill -9 of the Router: running streams go on to their end, new requests wait for the new one."""
    client = up.async_client(timeout=120)
    running = [asyncio.create_task(ask(client, up, number, max_tokens=60)) for number in range(4)]
    await asyncio.sleep(1)
    (router,) = up.processes(":Router")
    router.kill()
    fresh = [asyncio.create_task(ask(client, up, number, max_tokens=4)) for number in range(10, 14)]
    chats = await asyncio.gather(*running, *fresh)
    assert all(chunks[-1].choices[0].finish_reason == "length" for chunks in chats)
