"""The simulated cluster: times by hand, laws, and determinism. Deaths: test_simulator_failures."""

import dataclasses
import os
import subprocess
import sys

import numpy as np
import pytest

from serving.messages import BlockSnapshot
from serving.simulator import DONE, LATE, REFUSED, SimSetup, simulate
from tests.serving.simulator_cases import (
    BLOCK_TOKENS,
    STEP,
    TWO,
    Scripted,
    a_load,
    a_replica,
    a_request,
    arrays,
    digest,
    in_turn,
    production,
    run_scripted,
)


def test_one_request_takes_the_sum_of_its_hops_and_steps():
    """Half the hop, half a round trip there, its steps as predicted, half a round trip back."""
    setup = SimSetup(
        replicas=(a_replica(region="eu", max_step_tokens=64),),
        block_tokens=BLOCK_TOKENS,
        rtt_ms={("eu", "us"): 80.0},
        router_regions=("us",),
        router_hop_ms=2.0,
    )
    result, _ = run_scripted(setup, [a_request(0, 1.0, prompt_tokens=100, output_tokens=3)])
    prefill_ms = STEP.predict_ms(64, 64, 0, 64 * 32) + STEP.predict_ms(36, 100, 1, 36 * (64 + 18))
    decode_ms = STEP.predict_ms(1, 101, 1, 100.5) + STEP.predict_ms(1, 102, 1, 101.5)
    assert result.ttft_s[0] * 1e3 == pytest.approx(2 + 80 + prefill_ms)
    assert result.e2e_s[0] * 1e3 == pytest.approx(2 + 80 + prefill_ms + decode_ms)
    assert result.tpot_s[0] * 1e3 == pytest.approx(decode_ms / 2)
    assert result.queue_s[0] == pytest.approx(0.0, abs=1e-12)
    assert result.busy_s[0] * 1e3 == pytest.approx(prefill_ms + decode_ms)
    assert result.output_tokens[0] == 3 and result.prefill_tokens[0] == 100
    assert result.regions[result.region[0]] == "eu"


@pytest.mark.parametrize("make_policy", [production, lambda number, setup: Scripted(in_turn)])
def test_fast_forward_changes_no_time(make_policy):
    """Single steps and runs give the same result, preemptions and evictions included.

    The same but for rounding: a run's time is a product, its steps' a sum. Only the use of KV within
    a run is an approximation, by the blocks of the step under way: at most one a sequence.
    """
    small = SimSetup(
        replicas=(a_replica("r0", num_blocks=150), a_replica("r1", num_blocks=120)),
        block_tokens=BLOCK_TOKENS,
    )
    requests = a_load(200, rate=14.0)
    requests += [
        dataclasses.replace(request, number=200 + n, arrival_s=20 + n, output_tokens=700)  # unheard of
        for n, request in enumerate(requests[:30])
    ]
    fast = simulate(small, requests, make_policy)
    slow = simulate(dataclasses.replace(small, fast_forward=False), requests, make_policy)
    assert slow.counts["fast_forwarded_steps"] == 0
    assert fast.counts["steps"] + fast.counts["fast_forwarded_steps"] == slow.counts["steps"]
    assert slow.counts["steps"] > 5 * fast.counts["steps"]
    a_block_each = max(one.max_num_seqs / one.num_blocks for one in small.replicas)
    for name, value in arrays(slow).items():
        blocks = {"kv_utilisation": 2e-3, "kv_utilisation_series": a_block_each}
        np.testing.assert_allclose(
            getattr(fast, name), value, rtol=0, atol=blocks.get(name, 1e-9), err_msg=name
        )
    assert np.abs(fast.kv_utilisation_series - slow.kv_utilisation_series).mean() < 2e-3
    assert slow.counts["block_events"] == fast.counts["block_events"] > 0
    assert slow.cached_tokens.sum() > 0 and slow.preemptions.sum() > 0


def test_the_same_run_gives_the_same_bits():
    """Two runs agree in every bit of every array."""
    requests = a_load(150, rate=20.0)
    one, other = (digest(simulate(TWO, requests, production)) for _ in range(2))
    assert one == other


def test_nothing_depends_on_the_hash_seed():
    """Two processes that hash strings differently agree in every bit."""
    program = (
        "import hashlib\n"
        "from serving.simulator import simulate\n"
        "from tests.serving.simulator_cases import TWO, a_load, digest, production\n"
        "result = digest(simulate(TWO, a_load(100, 30.0), production))\n"
        "print(hashlib.sha256(repr(sorted(result.items())).encode()).hexdigest())"
    )
    printed = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(printed) == 1


def test_tokens_and_prompts_are_conserved():
    """Every reply has its true length, and every prompt token was cached or computed once."""
    requests = a_load(120, rate=10.0, max_tokens=150)
    roomy = SimSetup(replicas=(a_replica("r0", num_blocks=4096),), block_tokens=BLOCK_TOKENS)
    result, _ = run_scripted(roomy, requests)
    assert (result.outcome == DONE).all() and result.preemptions.sum() == 0
    assert result.output_tokens.tolist() == [min(r.output_tokens, r.max_tokens) for r in requests]
    prompt_tokens = sum(request.prompt_tokens for request in requests)
    assert result.prefill_tokens.sum() + result.cached_tokens.sum() == prompt_tokens
    assert result.cached_tokens.sum() > 0


def test_a_reply_is_found_by_the_prompt_that_repeats_it():
    """A session's next turn finds the blocks of the earlier reply, if it names them."""
    first = a_request(0, 0.0, prompt_tokens=40, output_tokens=60, prefix="s")
    names = a_request(0, 0.0, prompt_tokens=120, output_tokens=1, prefix="s").block_hashes
    second = a_request(1, 5.0, prompt_tokens=120, output_tokens=1, prefix="s")
    roomy = SimSetup(replicas=(a_replica(),), block_tokens=BLOCK_TOKENS)
    without, _ = run_scripted(roomy, [first, second])
    named, _ = run_scripted(roomy, [dataclasses.replace(first, output_hashes=names[2:6]), second])
    assert without.cached_tokens[1] == 2 * BLOCK_TOKENS
    assert named.cached_tokens[1] == 6 * BLOCK_TOKENS


def test_a_refusal_is_asked_again_without_the_refuser():
    """The second question names who refused, and the request runs elsewhere."""

    def to_the_first(request, members):
        return next(name for name in members if name not in request.refused_replicas)

    setup = SimSetup(replicas=(a_replica("r0", num_blocks=80), a_replica("r1")), block_tokens=BLOCK_TOKENS)
    requests = [a_request(n, 0.001 * n, output_tokens=50, max_tokens=50) for n in range(3)]
    result, (policy,) = run_scripted(setup, requests, to_the_first, reserve_blocks=30)
    assert result.replica.tolist() == [0, 0, 1] and result.refusals.tolist() == [0, 0, 1]
    assert [r.refused_replicas for _, r in policy.requests] == [(), (), (), ("r0",)]
    told = [(u.request_id, u.replica_id, u.outcome) for _, u in policy.updates if u.request_id == "2"]
    assert told == [("2", "r1", "accepted"), ("2", "r1", "finished")]


def test_queued_waits_for_the_later_answer_and_overloaded_ends():
    """Who waits is served once there is an answer; who is refused by the router is a miss."""
    state = {"open": False}

    def choose(request, members):
        if request.request_id == "1":
            state["open"] = True
            return "overloaded"
        return "r0" if state["open"] else "queue"

    result, _ = run_scripted(TWO, [a_request(0, 0.0), a_request(1, 2.0)], choose)
    assert result.outcome.tolist() == [DONE, REFUSED]
    assert result.ttft_s[0] > 2.0 and result.queue_s[0] == pytest.approx(2.1, abs=0.11)
    assert np.isnan(result.ttft_s[1]) and result.replica[1] == -1


def test_the_deadline_ends_a_request_wherever_it_is():
    """In a router's queue it is withdrawn, on a replica aborted: its blocks are free again."""
    queued = a_request(0, 0.0, deadline_s=1.0)
    running = a_request(1, 0.0, output_tokens=900, deadline_s=1.0)
    free = a_request(2, 0.0, output_tokens=900)
    result, (policy,) = run_scripted(
        TWO, [queued, running, free], lambda r, _: "queue" if r.request_id == "0" else "r0"
    )
    assert result.outcome.tolist() == [LATE, LATE, DONE]
    assert 0 < result.output_tokens[1] < 900
    assert policy.held == {}
    assert [request.request_id for now, request in policy.requests if now > 1.0] == ["0"]


def test_staleness_delays_reports_and_events_but_no_answers():
    """A report reaches a router half a round trip and the staleness after it was made."""
    requests = a_load(40, rate=20.0)
    fresh, (seen,) = run_scripted(TWO, requests)
    stale, (later,) = run_scripted(dataclasses.replace(TWO, staleness_ms=500.0), requests)
    assert digest(fresh)["ttft_s"] == digest(stale)["ttft_s"]  # this policy looks at none of it
    for one, other in ((seen.loads, later.loads), (seen.news, later.news)):
        assert len(one) > 10
        delays = [
            (late[0] - early[0], late[1:] == early[1:])
            for early, late in zip(one[2:], other[2:], strict=False)
        ]
        assert all(same and delay == pytest.approx(0.5) for delay, same in delays if delay), delays


def test_reports_come_at_most_every_50_ms_and_at_least_once_a_second():
    """In work and out of it, and each is newer than the one before."""
    requests = [*a_load(40, rate=20.0), a_request(40, 30.0)]
    _, (policy,) = run_scripted(TWO, requests)
    mine = [(now, load) for now, load in policy.loads if load.replica_id == "r0"]
    gaps = np.diff([now for now, _ in mine[1:]])
    assert gaps.min() >= 0.05 - 1e-9 and gaps.max() <= 1.0 + 1e-9
    assert [load.sequence for _, load in mine] == list(range(1, len(mine) + 1))


def test_a_router_that_missed_events_is_sent_a_snapshot():
    """Once for as long as it waits for one."""

    def make(number, setup):
        policy = Scripted(in_turn)
        policy.knows_blocks = False
        return policies.append(policy) or policy

    policies = []
    result = simulate(TWO, a_load(30, rate=20.0), make)
    snapshots = [news for _, _, news in policies[0].news if isinstance(news, BlockSnapshot)]
    assert 2 <= len(snapshots) <= len(policies[0].news) - len(snapshots)
    assert result.counts["snapshots"] >= len(snapshots)


def test_each_router_hears_only_of_its_own_requests():
    """Requests go to the router of their number, in their region if one stands there."""
    setup = dataclasses.replace(
        TWO, num_routers=3, router_regions=("us", "us", "eu"), rtt_ms={("us", "eu"): 80.0}
    )
    requests = [a_request(n, 0.1 * n, region="eu" if n >= 4 else "us") for n in range(6)]
    _, policies = run_scripted(setup, requests)
    asked = [[request.request_id for _, request in policy.requests] for policy in policies]
    assert asked == [["0", "2"], ["1", "3"], ["4", "5"]]
    assert [{u.request_id for _, u in policy.updates} for policy in policies] == [set(ids) for ids in asked]
    assert len(policies[0].loads) == len(policies[1].loads) > 4


def test_utilisation_counts_held_blocks_over_time():
    """One sequence of known size: the series shows its blocks, the mean their part of the time."""
    setup = SimSetup(replicas=(a_replica(num_blocks=100),), block_tokens=BLOCK_TOKENS)
    result, _ = run_scripted(setup, [a_request(0, 0.0, prompt_tokens=16 * 20, output_tokens=900)])
    series = result.kv_utilisation_series[:, 0]
    assert series[0] == 0.0 and 0.20 < series[1] < series[-1] <= 0.77
    assert result.kv_utilisation[0] == pytest.approx((0.20 + 0.77) / 2, abs=0.01)


def test_progress_is_told():
    """As many as have ended, of all."""
    told = []
    simulate(TWO, a_load(50, rate=10.0), production, lambda done, total: told.append((done, total)))
    assert told == sorted(told) and told[0] == (0, 50) and 25 < told[-1][0] <= 50
