"""Deaths of simulated replicas and routers: what was there is served elsewhere, or said to be lost."""

import dataclasses

import numpy as np
import pytest

from serving.simulator import DONE, LOST, SimSetup, simulate
from tests.serving.simulator_cases import (
    BLOCK_TOKENS,
    TWO,
    Scripted,
    a_load,
    a_replica,
    a_request,
    in_turn,
    production,
    run_scripted,
)


def test_who_has_no_token_yet_is_served_elsewhere_and_who_has_is_lost():
    """As Ingress does: a stream that has begun is not begun again."""
    setup = dataclasses.replace(TWO, failures=((0.5, "r0"),))
    begun = a_request(0, 0.0, output_tokens=500)
    computing = a_request(2, 0.49, prompt_tokens=2000)
    to_r0 = lambda request, _: "r1" if "r0" in request.refused_replicas else "r0"  # noqa: E731
    result, (policy,) = run_scripted(setup, [begun, computing], to_r0)
    assert result.outcome.tolist() == [LOST, DONE]
    assert result.replica.tolist() == [-1, 1]
    assert np.isnan(result.ttft_s[0]) and result.ttft_s[1] > 0
    outcomes = [(u.request_id, u.replica_id, u.outcome) for _, u in policy.updates]
    assert ("0", "r0", "finished") in outcomes and ("2", "r0", "lost") in outcomes
    assert policy.memberships == [(0.0, ["r0", "r1"]), (pytest.approx(0.7), ["r1"])]


def test_a_request_whose_replicas_keep_dying_is_lost():
    """Two deaths are enough: it may be what kills them."""
    three = SimSetup(
        replicas=tuple(a_replica(f"r{n}") for n in range(3)),
        block_tokens=BLOCK_TOKENS,
        failures=((0.1, "r0"), (0.2, "r1")),
    )
    request = a_request(0, 0.0, prompt_tokens=4000)
    in_order = lambda request, members: next(m for m in members if m not in request.refused_replicas)  # noqa: E731
    result, (policy,) = run_scripted(three, [request], in_order)
    assert result.outcome.tolist() == [LOST] and len(policy.requests) == 2


def test_routes_to_the_dead_are_asked_again_before_membership_knows():
    """Ingress has seen the stream break: it asks for another replica, and that counts as no loss."""
    setup = dataclasses.replace(TWO, failures=((1.0, "r0"),))
    requests = [a_request(n, 1.05 + 0.01 * n, output_tokens=5) for n in range(10)]
    result, (policy,) = run_scripted(setup, requests)
    assert (result.outcome == DONE).all() and (result.replica == 1).all()
    assert len(policy.requests) == 15 and not any(u.outcome == "lost" for _, u in policy.updates)


def test_whom_a_dead_router_had_queued_another_router_serves():
    """The queue dies with the router; Ingress asks the next one 0.1 s later."""
    setup = dataclasses.replace(TWO, num_routers=2, router_failures=((2.0, 0),))
    policies = []

    def make(number, setup):
        policies.append(Scripted(in_turn if number else lambda request, members: "queue"))
        return policies[-1]

    result = simulate(setup, [a_request(n, 0.1 * n) for n in range(6)] + [a_request(6, 3.0)], make)
    assert (result.outcome == DONE).all()
    late = result.ttft_s > 1.0
    assert late.tolist() == [True, False, True, False, True, False, False]
    assert {request.request_id for now, request in policies[1].requests if now > 2.0} == {"0", "2", "4", "6"}


@pytest.mark.parametrize("num_routers", [1, 3])
def test_the_production_policy_loses_only_what_had_begun(num_routers):
    """Every request ends once, and none is refused, through the death of one of three replicas."""
    setup = SimSetup(
        replicas=tuple(a_replica(f"r{n}") for n in range(3)),
        block_tokens=BLOCK_TOKENS,
        num_routers=num_routers,
        staleness_ms=100.0,
        failures=((4.0, "r1"),),
        router_failures=((6.0, 0),) if num_routers > 1 else (),
    )
    requests = a_load(200, rate=20.0)
    result = simulate(setup, requests, production)
    assert set(result.outcome.tolist()) <= {DONE, LOST}
    assert 0 < (result.outcome == LOST).sum() <= 16  # no more than ran there
    began_before = np.array([request.arrival_s < 4.0 for request in requests])
    assert began_before[result.outcome == LOST].all()
