"""The adapter of all baselines: what it knows is what it was told, and the simulator runs every one."""

import random

import msgspec
import numpy as np
import pytest

from cluster.load import StepCoefficients
from serving.bench.router.baseline_policy import BaselinePolicy
from serving.bench.router.baseline_regions import SkyWalker
from serving.bench.router.baseline_scores import Dynamo, RoundRobin
from serving.bench.router.baselines import BASELINES
from serving.messages import (
    BlockEvents,
    BlockStored,
    DispatchUpdate,
    Overloaded,
    Queued,
    Route,
    RouteRequest,
)
from serving.simulator import DONE, SimReplica, SimRequest, SimSetup, simulate
from tests.serving.routing_cases import BLOCK_TOKENS, a_load

STEP = StepCoefficients(base_ms=8.0, per_token_ms=0.06, per_kv_token_ms=2e-5)
LOAD = a_load("a", region="here")


def request(name, blocks=4, refused=(), deadline_s=1e9):
    return RouteRequest(
        request_id=name,
        ingress_id="ingress",
        model="m",
        tenant_key="t",
        deadline_s=deadline_s,
        prompt_tokens=blocks * BLOCK_TOKENS,
        max_tokens=10,
        block_hashes=tuple(bytes([n]) for n in range(blocks)),
        refused_replicas=refused,
    )


def policy_of(rule, members=("a", "b")):
    policy = BaselinePolicy(rule, {"a": "here", "b": "here", "c": "there"}, block_tokens=BLOCK_TOKENS, seed=0)
    policy.membership(set(members), 0.0)
    return policy


def told(policy, outcome, name, replica, submission=0):
    update = DispatchUpdate(request_id=name, replica_id=replica, outcome=outcome, submission=submission)
    return policy.update(update, 0.0)


def seen(policy, rule):
    """What the rule sees of each replica: (in flight, uncached tokens not reported)."""
    found = {}
    choose = rule.choose

    def look(asked, candidates, now):
        found.update({c.name: (c.in_flight, sum(c.unreported.values())) for c in candidates})
        return choose(asked, candidates, now)

    rule.choose = look
    policy.request(request("look"), 0.0)
    told(policy, "finished", "look", "a")
    told(policy, "finished", "look", "b")
    rule.choose = choose
    return found


def test_a_route_reserves_nothing():
    """So a replica queues what it has no room for, as behind a peer's router."""
    answer = policy_of(RoundRobin()).request(request("r"), 0.0)
    assert isinstance(answer, Route)
    assert (answer.replica_id, answer.region, answer.reserve_blocks) == ("a", "here", 0)


def test_a_send_counts_as_unreported_until_a_report_includes_it():
    """And as in flight until it ends."""
    rule = RoundRobin()
    policy = policy_of(rule)
    policy.request(request("r"), 0.0)
    assert seen(policy, rule) == {"a": (1, 64), "b": (0, 0)}
    policy.replica_reported(LOAD, 0.0)
    told(policy, "accepted", "r", "a", submission=1)
    assert seen(policy, rule)["a"] == (1, 64)
    policy.replica_reported(msgspec.structs.replace(LOAD, sequence=2, last_submission=1), 0.0)
    assert seen(policy, rule)["a"] == (1, 0)
    told(policy, "finished", "r", "a")
    assert seen(policy, rule)["a"] == (0, 0)


def test_a_report_that_is_older_than_the_last_is_ignored():
    rule = RoundRobin()
    policy = policy_of(rule)
    policy.request(request("r"), 0.0)
    told(policy, "accepted", "r", "a", submission=1)
    policy.replica_reported(msgspec.structs.replace(LOAD, sequence=3), 0.0)
    policy.replica_reported(msgspec.structs.replace(LOAD, sequence=2, last_submission=1), 0.0)
    assert seen(policy, rule)["a"] == (1, 64)


def test_a_refuser_is_not_asked_again_and_its_route_is_undone():
    policy = policy_of(RoundRobin())
    assert policy.request(request("r"), 0.0).replica_id == "a"
    assert policy.request(request("r", refused=("a",)), 0.0).replica_id == "b"
    policy.check_integrity()
    refused = policy.request(request("r", refused=("a", "b")), 0.0)
    assert isinstance(refused, Overloaded)
    assert refused.permanent


def test_without_a_replica_it_is_overloaded_for_now():
    answer = policy_of(RoundRobin(), members=()).request(request("r"), 0.0)
    assert isinstance(answer, Overloaded)
    assert not answer.permanent


def test_a_lost_replica_takes_its_requests_with_it():
    policy = policy_of(RoundRobin())
    policy.request(request("r"), 0.0)
    told(policy, "lost", "", "a")
    policy.check_integrity()
    assert policy.request(request("s"), 0.0).replica_id == "b"
    policy.membership({"a", "b"}, 1.0)
    policy.check_integrity()


def test_block_events_reach_a_rule_that_reads_them():
    """What the engine cached is credited; a gap asks for a snapshot."""
    policy = policy_of(Dynamo())
    stored = tuple(BlockStored(block_hash=bytes([n]), parent=b"") for n in range(3))
    assert policy.replica_events("b", 1, BlockEvents(first_number=1, events=stored), 0.0)
    answer = policy.request(request("r"), 0.0)
    assert (answer.replica_id, answer.matched_blocks) == ("b", 3)
    assert not policy.replica_events("b", 1, BlockEvents(first_number=9, events=stored), 0.0)


def test_who_waits_is_answered_in_turn_as_soon_as_a_replica_has_no_queue():
    """SkyWalker's balancer holds requests; nobody overtakes."""
    policy = policy_of(SkyWalker("here"), members=("a",))
    policy.replica_reported(msgspec.structs.replace(LOAD, num_waiting=1), 0.0)
    first, second = policy.request(request("first"), 0.0), policy.request(request("second"), 0.0)
    assert isinstance(first, Queued)
    assert isinstance(second, Queued)
    assert (first.position, second.position) == (1, 2)
    answers = policy.replica_reported(msgspec.structs.replace(LOAD, sequence=2), 1.0)
    assert [(to, answer.request_id) for to, answer in answers] == [
        ("ingress", "first"),
        ("ingress", "second"),
    ]
    assert all(isinstance(answer, Route) for _, answer in answers)


def test_who_waits_past_its_deadline_is_overloaded():
    policy = policy_of(SkyWalker("here"), members=("a",))
    policy.replica_reported(msgspec.structs.replace(LOAD, num_waiting=1), 0.0)
    policy.request(request("r", deadline_s=2.0), 0.0)
    assert policy.tick(1.0) == []
    ((_, answer),) = policy.tick(2.0)
    assert isinstance(answer, Overloaded)


def load_of_sessions(seed, num_requests=120):
    """Sessions with long common beginnings in two regions."""
    rng = random.Random(seed)
    requests, now = [], 0.0
    for number in range(num_requests):
        now += rng.expovariate(15)
        session = rng.randrange(12)
        common = [f"s{session}-{n}" for n in range(8 + session)]
        own = [f"r{number}-{n}" for n in range(rng.randrange(1, 8))]
        hashes = tuple(name.encode().ljust(16, b".") for name in common + own)
        region = "ab"[number % 2]
        tokens = len(hashes) * 64 + 7
        requests.append(SimRequest(number, now, region, "t", 0, tokens, rng.randrange(5, 40), 64, hashes))
    return requests


def setup_of(num_routers=2):
    replicas = tuple(SimReplica(f"r{n}", "ab"[n % 2], 400, STEP, 1024, 32) for n in range(4))
    return SimSetup(
        replicas,
        64,
        {("a", "b"): 40.0},
        num_routers=num_routers,
        router_regions=("a", "b")[:num_routers],
        staleness_ms=50.0,
    )


@pytest.mark.parametrize("name", BASELINES)
def test_the_simulator_serves_a_load_with_every_baseline(name):
    """Nothing is lost or counted for ever, and the same seed gives the same run."""
    policies = []

    def make(router, setup):
        policies.append(BASELINES[name](router, setup))
        return policies[-1]

    requests = load_of_sessions(1)
    result = simulate(setup_of(), requests, make)
    assert np.all(result.outcome == DONE)
    assert len(policies) == 2
    for policy in policies:
        policy.check_integrity()
        assert not policy._dispatches
    again = simulate(setup_of(), requests, BASELINES[name])
    assert np.array_equal(result.replica, again.replica)


def test_affinity_finds_what_round_robin_recomputes():
    """Every peer that looks at prefixes hits far more of them than the one that does not."""
    requests = load_of_sessions(2)

    def hits(name):
        return simulate(setup_of(), requests, BASELINES[name]).cached_tokens.sum()

    blind = hits("round robin")
    for name in ("ray prefix", "sglang", "smg", "vllm-router", "llm-d", "dynamo", "lmetric", "skywalker"):
        assert hits(name) > 1.2 * blind, name
