"""Four replicas with mock engines: what the Router must do when all want the same, and when things die.

Everything but the maths is real: processes, Serve, gateway, Router, schedulers and block pools.
"""

import asyncio
import json
import re
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from clusters import FLEET_BLOCKS, FLEET_DEADLINE_S, FLEET_REPLICAS, environment, eventually

RIVAL = Path(__file__).with_name("rival_ingress.py")
PROMPT = "The harbour master counts the ships that come in with the tide. " * 5
SILENCE_S = 7.0
NOTICED_S = 4.5  # the Router doubts a replica that was silent for 3 s


def replicas(up):
    return {replica["load"]["replica_id"]: replica for replica in up.status()["replicas"]}


def submissions(up):
    """How many requests each replica has accepted since it began."""
    return {name: replica["load"]["last_submission"] for name, replica in replicas(up).items()}


def is_idle(replica):
    load = replica["load"]
    held = load["num_running"] + load["num_waiting"] + load["blocks_reserved"]
    return replica["state"] == "fresh" and replica["num_in_flight"] == held == 0


def all_idle(up):
    """Every replica reports, runs nothing, and has nothing reserved."""
    try:
        states = list(replicas(up).values())
    except (httpx.HTTPError, ValueError, KeyError):  # the Router is just not there
        return False
    return len(states) == FLEET_REPLICAS and all(map(is_idle, states))


@pytest.fixture
def up(mock_fleet):
    """The fleet, whole and idle before the test and after it: no block is lost, whatever happened."""
    eventually(lambda: all_idle(mock_fleet), timeout_s=30)
    yield mock_fleet
    eventually(lambda: all_idle(mock_fleet), timeout_s=30)


async def ask(client, up, prompt=PROMPT, max_tokens=8):
    """One reply, whole; returns its id."""
    reply = await client.completions.create(model=up.model, prompt=prompt, max_tokens=max_tokens)
    assert reply.choices[0].finish_reason == "length" and reply.usage.completion_tokens == max_tokens
    return reply.id


async def test_a_burst_of_equal_requests_spreads(up):
    """200 with one prompt at once: all answered, and no replica gets more than 40 %, cached or not."""
    client = up.async_client(timeout=60)
    await ask(client, up)  # now one replica has the prompt in its cache
    eventually(lambda: all_idle(up))
    before = submissions(up)
    await asyncio.gather(*(ask(client, up) for _ in range(200)))
    eventually(lambda: all_idle(up))
    got = {name: count - before[name] for name, count in submissions(up).items()}
    assert sum(got.values()) == 200
    assert max(got.values()) <= 80, got


async def test_what_replicas_refuse_is_served_elsewhere_or_later(up):
    """A rival that the Router does not know of fills the pools: requests are refused, picked again, and
    all answered; the rival's are all ended, too.
    """
    client = up.async_client(timeout=60)
    with rival(up, seconds=3, reserve_blocks=FLEET_BLOCKS - 5) as competing:
        started = time.monotonic()
        asked = []
        while time.monotonic() < started + 3:
            prompt = f"{len(asked)} {PROMPT}"
            asked.append(asyncio.create_task(ask(client, up, prompt, max_tokens=32)))
            await asyncio.sleep(0.04)
        ids = await asyncio.gather(*asked)
    found = competing.found
    assert found["accepted"] == found["length"] > FLEET_REPLICAS
    ended = {line["request_id"]: line for line in logged(up, "request ended")}
    refusals = sum(ended[request_id]["refusals"] for request_id in ids)
    assert len(set(ids)) == len(asked) and refusals > 0


async def test_a_silent_replica_holds_up_nobody_for_long(up):
    """SIGSTOP a replica: what it has waits for it, what comes later goes elsewhere at once, nothing
    hangs beyond its deadline, and after SIGCONT it serves again.
    """
    client = up.async_client(timeout=60)
    process = up.processes("ModelReplica")[0]
    process.suspend()
    try:
        begun = time.monotonic()
        asked = []
        while time.monotonic() < begun + SILENCE_S:
            asked.append(asyncio.create_task(timed(ask(client, up, f"{len(asked)} {PROMPT}"))))
            await asyncio.sleep(0.1)
        (silent,) = [name for name, replica in replicas(up).items() if replica["state"] != "fresh"]
    finally:
        process.resume()
    times = await asyncio.gather(*asked)
    assert max(times) < FLEET_DEADLINE_S
    noticed = int(NOTICED_S / SILENCE_S * len(times))
    assert max(times[noticed:]) < SILENCE_S - NOTICED_S - 0.5, times

    before = submissions(up)[silent]

    async def serves():
        await asyncio.gather(*(ask(client, up, f"{n} again {PROMPT}") for n in range(20)))
        return submissions(up)[silent] > before

    served = [await serves() for _ in range(3)]
    assert any(served)


async def test_a_dead_router_costs_no_accepted_request(up):
    """kill -9 amid 50 streams: every one runs to its end, and 20 new ones are served by its successor."""
    client = up.async_client(timeout=60)
    first_tokens = [asyncio.Event() for _ in range(50)]

    async def stream(number):
        chunks = await client.completions.create(
            model=up.model, prompt=f"{number} {PROMPT}", max_tokens=120, stream=True
        )
        text, reason = "", None
        async for chunk in chunks:
            first_tokens[number].set()
            text += chunk.choices[0].text
            reason = chunk.choices[0].finish_reason or reason
        return len(text) > 0 and reason

    running = [asyncio.create_task(stream(number)) for number in range(50)]
    await asyncio.gather(*(first.wait() for first in first_tokens))
    assert not any(task.done() for task in running)
    (router,) = up.processes(":Router")
    router.kill()
    fresh = [asyncio.create_task(ask(client, up, f"new {number} {PROMPT}")) for number in range(20)]
    assert set(await asyncio.gather(*running)) == {"length"}
    assert len(set(await asyncio.gather(*fresh))) == 20
    assert eventually(lambda: up.processes(":Router"))[0].pid != router.pid


async def timed(awaitable):
    started = time.monotonic()
    await awaitable
    return time.monotonic() - started


def logged(up, message):
    """Lines of the fleet's JSON logs with this message."""
    files = {file.path for process in up.processes(":Ingress") for file in process.open_files()}
    sessions = {re.sub(r"/logs/.*", "/logs", path) for path in files if "/session_" in path}
    texts = [file.read_text() for folder in sessions for file in Path(folder).glob("worker-*.err")]
    lines = [line for text in texts for line in text.splitlines() if f'"message": "{message}"' in line]
    return [json.loads(line) for line in lines]


@contextmanager
def rival(up, *, seconds, reserve_blocks):
    """A rival front door at work; afterwards its `found` is what it printed."""
    facts = json.loads((up.state / "searoom" / "running.json").read_text())
    deployment = f"ModelReplica-{up.model}-local"
    command = [sys.executable, str(RIVAL), facts["ray_address"], deployment, str(FLEET_REPLICAS)]
    process = subprocess.Popen(
        [*command, str(seconds), str(reserve_blocks)],
        env=environment(up.state) | up.ray_environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout.readline() == "ready\n"
        yield process
        process.found = json.loads(process.communicate(timeout=60)[0].splitlines()[-1])
        assert process.returncode == 0
    finally:
        process.kill()
