"""The rules beside the gateways of which they are models, and the workers those run before.

`gateway_picks/` holds what smg 1.13.0, vllm-router 0.1.17 and sglang-router 0.3.2 chose on 2026-11-22:
`python -m serving.bench.router.check_baselines --gateway ... --seed 2 --workers 6 --record FILE`.
"""

import asyncio
import json
from pathlib import Path

import httpx
import pytest

from serving.bench.router.baseline_scores import RoundRobin
from serving.bench.router.check_baselines import REQUIRED, RULES, End, Send, agreement, sequence
from serving.bench.router.gateway_run import GatewayFailed, picks_of
from serving.bench.router.gateway_workers import MODEL, MockWorkers, named

PICKS = Path(__file__).parent / "gateway_picks"


def recorded(gateway):
    record = json.loads((PICKS / f"{gateway}.json").read_text())
    steps = sequence(record["seed"], len(record["picks"]))
    return steps, dict(enumerate(record["picks"])), record["workers"]


@pytest.mark.parametrize("gateway", RULES)
def test_a_rule_picks_as_the_real_gateway_did(gateway):
    """At least 95 in 100, of all picks and of those of which the rule allows one replica only."""
    steps, picks, workers = recorded(gateway)
    found = agreement(RULES[gateway](), steps, picks, workers)
    assert found.picks >= 300
    assert found.decided >= 300
    assert found.is_enough, found.differences[:5]


def test_another_rule_is_found_out():
    """The comparison would notice: round robin agrees by chance only."""
    steps, picks, workers = recorded("smg")
    found = agreement(RoundRobin(), steps, picks, workers)
    assert found.equal < 0.3 * found.picks
    assert not found.is_enough
    assert len(found.differences) == found.picks - found.equal


def test_a_sequence_has_every_case():
    """Its prefixes come again, its loads get over 64 apart, and every request ends once or not at all."""
    steps = sequence(0)
    sent = [step.text for step in steps if isinstance(step, Send)]
    ended = [step.number for step in steps if isinstance(step, End)]
    assert len(sent) >= 300
    assert len(set(ended)) == len(ended)
    again = sum(any(text.startswith(earlier[:100]) for earlier in sent[:n]) for n, text in enumerate(sent))
    assert 0.5 * len(sent) < again < 0.95 * len(sent)
    in_flight, most = 0, 0
    for step in steps:
        in_flight += 1 if isinstance(step, Send) else -1
        most = max(most, in_flight)
    assert most > 100
    assert sequence(0) == steps != sequence(1)


async def test_a_worker_answers_when_it_is_told_to():
    async with MockWorkers(2) as workers, httpx.AsyncClient() as client:
        body = {"model": MODEL, "prompt": named("hello", 17), "max_tokens": 1}
        answer = asyncio.create_task(client.post(f"{workers.urls[1]}/v1/completions", json=body))
        assert await workers.arrival() == (1, 17)
        await asyncio.sleep(0.02)
        assert not answer.done()
        workers.release(17)
        assert (await answer).json()["choices"][0]["text"] == "ok"


async def test_a_worker_tells_gateways_what_they_ask_and_no_more():
    async with MockWorkers(1) as workers, httpx.AsyncClient(base_url=workers.urls[0]) as client:
        assert (await client.get("/health")).status_code == 200
        assert (await client.get("/v1/models")).json()["data"][0]["id"] == MODEL
        assert (await client.get("/metrics")).status_code == 404
        tokens = (await client.post("/tokenize", json={"prompt": "abc"})).json()["tokens"]
        assert tokens == [97, 98, 99]


async def test_a_gateway_that_does_not_start_says_its_last_words(tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho no such module\nexit 1\n")
    python.chmod(0o755)
    with pytest.raises(GatewayFailed, match="no such module"):
        await picks_of("smg", python, sequence(0), 2, lambda: None)


def test_what_is_required_is_what_the_goal_says():
    assert REQUIRED == 0.95
