"""Traces, the generator, and how a workload is brought to a load."""

import json
from itertools import pairwise

import numpy as np
import pytest

from serving.bench.router.capacity import at_load, work_of
from serving.bench.router.generated import GeneratorPlan, generate
from serving.bench.router.reference_fleet import BLOCK_TOKENS, fleet
from serving.bench.router.traces import MOONCAKE_TICK_S, read_trace
from serving.bench.router.workload import Window, in_regions, with_tenants
from serving.errors import ConfigError

MOONCAKE = (
    {"timestamp": 0, "input_length": 1300, "output_length": 5, "hash_ids": [0, 1, 2]},
    {"timestamp": 0, "input_length": 1024, "output_length": 7, "hash_ids": [0, 3]},
    {"timestamp": 3000, "input_length": 2048, "output_length": 9, "hash_ids": [0, 1, 4, 5]},
    {"timestamp": 6000, "input_length": 600, "output_length": 1, "hash_ids": [0, 3]},
)
AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
"""


@pytest.fixture
def mooncake(tmp_path):
    path = tmp_path / "talk.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in MOONCAKE))
    return path


def written(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text)
    return path


def test_equal_ids_are_equal_engine_blocks(mooncake):
    """Each 512-token id is 8 blocks of 64; prompts share just the blocks of their common ids."""
    first, second, third, fourth = (r.block_hashes for r in read_trace(mooncake, 64, raw_times=True).requests)
    assert [len(first), len(second), len(third), len(fourth)] == [1300 // 64, 16, 32, 600 // 64]
    assert third[:16] == first[:16] and third[16] != first[16]
    assert second[:8] == first[:8] and not set(second[8:]) & set(first)
    assert fourth == second[: len(fourth)]
    assert all(len(name) == 16 for name in first)


def test_a_name_tells_what_is_before_it(tmp_path):
    """The same id behind another one names other blocks: hashes are chained."""
    lines = [{"timestamp": 0, "input_length": 1024, "output_length": 1, "hash_ids": [i, 7]} for i in (1, 2)]
    path = written(tmp_path, "t.jsonl", "\n".join(map(json.dumps, lines)))
    one, other = (request.block_hashes for request in read_trace(path, 64).requests)
    assert not set(one) & set(other)


def test_sessions_are_linked_beyond_the_block_that_all_share(mooncake):
    sessions = [request.session for request in read_trace(mooncake, 64, raw_times=True).requests]
    assert sessions == [0, 1, 0, 1]


def test_ticks_are_filled_by_the_seed(mooncake):
    """Raw times are the file's; jittered ones lie within a tick after them, the same for one seed."""
    raw = read_trace(mooncake, 64, raw_times=True)
    assert [request.arrival_s for request in raw.requests] == [0, 0, 3, 6]
    one, again, other = (read_trace(mooncake, 64, seed=seed) for seed in (1, 1, 2))
    assert one == again and one != other
    arrivals = [request.arrival_s for request in one.requests]
    assert arrivals[0] == 0 and arrivals == sorted(arrivals)
    assert all(0 < gap < 2 * MOONCAKE_TICK_S for gap in np.diff(arrivals))


def test_windows_are_spread_over_a_trace():
    assert [list(Window(n, 3, 4).cut(range(10))) for n in range(3)] == [
        [0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9],
    ]  # fmt: skip
    assert list(Window(1, 3, 0).cut(range(10))) == list(range(10))


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "line 2"),
        ('{"timestamp": 1, "input_length": 5, "output_length": 1}', "hash_ids"),
        ('{"timestamp": 1, "input_length": "5", "output_length": 1, "hash_ids": [1]}', "input_length"),
        ('{"timestamp": 1, "input_length": 5, "output_length": 0, "hash_ids": [1]}', "output_length is 0"),
        ('{"timestamp": 1, "input_length": 513, "output_length": 1, "hash_ids": [1]}', "2 blocks"),
    ],
)
def test_a_broken_mooncake_line_is_named(tmp_path, line, says):
    """File, line and field are in the error."""
    path = written(tmp_path, "t.jsonl", json.dumps(MOONCAKE[0]) + "\n" + line + "\n")
    with pytest.raises(ConfigError, match=r"t\.jsonl, line 2: ") as told:
        read_trace(path, 64)
    assert says in str(told.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a,b\n", "line 1: the columns"),
        (AZURE + "2023-11-16 18:15:51,3\n", "line 4: 2 fields"),
        (AZURE + "yesterday,3,4\n", "line 4: TIMESTAMP is 'yesterday'"),
        (AZURE + "2023-11-16 18:15:51.0,3,-4\n", "line 4: GeneratedTokens is '-4'"),
        (AZURE.splitlines()[0] + "\n", "holds no request"),
    ],
)
def test_a_broken_azure_line_is_named(tmp_path, text, says):
    with pytest.raises(ConfigError, match=says):
        read_trace(written(tmp_path, "t.csv", text), 64)


def test_azure_requests_share_nothing(tmp_path):
    """The trace has no prefixes, so none are made up; times are those of the file."""
    one, other = read_trace(written(tmp_path, "t.csv", AZURE), 64).requests
    assert (one.prompt_tokens, one.output_tokens, len(one.block_hashes)) == (374, 44, 5)
    assert not set(one.block_hashes) & set(other.block_hashes)
    assert other.arrival_s == pytest.approx(4.314579, abs=1e-5)


PLAN = GeneratorPlan(num_requests=600, span_s=300.0, lead_s=100.0)


def test_the_generator_follows_its_seed():
    assert generate(PLAN, 64, 3) == generate(PLAN, 64, 3) != generate(PLAN, 64, 4)


def test_a_later_turn_repeats_all_that_was_said_before():
    """A prompt begins with the former turn's whole prompt and reply, as far as blocks are full."""
    turns = {}
    for request in generate(PLAN, 64, 0).requests:
        assert len(request.block_hashes) == request.prompt_tokens // 64
        turns.setdefault(request.session, []).append(request)
    assert any(len(session) > 2 for session in turns.values())
    for session in turns.values():
        for before, after in pairwise(session):
            said = before.block_hashes + before.output_hashes
            assert len(said) == (before.prompt_tokens + before.output_tokens) // 64
            assert after.block_hashes[: len(said)] == said


def test_tenants_come_at_their_rates_and_share_only_among_themselves():
    plan = GeneratorPlan(num_requests=2000, span_s=600.0, tenant_rates=(10.0, 1.0))
    requests = generate(plan, 64, 1).requests
    blocks = {"tenant-0": set(), "tenant-1": set()}
    for request in requests:
        blocks[request.tenant].update(request.block_hashes)
    assert not blocks["tenant-0"] & blocks["tenant-1"]
    share = sum(request.tenant == "tenant-1" for request in requests) / len(requests)
    assert share == pytest.approx(1 / 11, abs=0.04)


def test_regions_have_their_days_at_different_times():
    """A third of the day apart, each region's busiest third is another one."""
    regions = ("us-east", "eu-west", "ap-south")
    plan = GeneratorPlan(
        num_requests=1500, span_s=3000.0, lead_s=200.0, regions=regions, day_depth=0.9, burst_share=0.0
    )
    for workload in (generate(plan, 64, 0), in_regions(generate(GeneratorPlan(1500), 64, 0), regions, 0)):
        thirds = {region: np.zeros(3) for region in regions}
        for request in workload.requests:
            shifted = request.arrival_s / workload.span_s + 1 / 6  # the first region's noon is at 0
            thirds[request.region][int(3 * shifted) % 3] += 1
        assert [int(thirds[region].argmax()) for region in regions] == [0, 1, 2]
        assert len({r.session: r.region for r in workload.requests}) == len(
            {(r.session, r.region) for r in workload.requests}
        )


def test_tenants_are_dealt_whole_sessions():
    requests = with_tenants(generate(PLAN, 64, 0), (10.0, 1.0), 5).requests
    assert len({(r.session, r.tenant) for r in requests}) == len({r.session for r in requests})
    assert {r.tenant for r in requests} == {"tenant-0", "tenant-1"}


def test_a_load_is_what_the_formula_says_of_it():
    """Scaled to 0.85 a workload is at 0.85, and twice the fleet is half as busy."""
    workload, setup = generate(PLAN, BLOCK_TOKENS, 0), fleet(4, ("local",))
    scaled = at_load(workload, setup, 0.85)
    assert work_of(scaled, setup).utilisation(4, scaled.span_s) == pytest.approx(0.85)
    assert work_of(scaled, setup).utilisation(8, scaled.span_s) == pytest.approx(0.425)
    assert [r.block_hashes for r in scaled.requests] == [r.block_hashes for r in workload.requests]


def test_the_work_of_one_uncached_prefill_is_its_steps_time():
    """With one output token a prompt of two chunks takes what the step model predicts for both."""
    setup = fleet(1, ("local",))
    replica = setup.replicas[0]
    plan = GeneratorPlan(num_requests=1)
    request = generate(plan, BLOCK_TOKENS, 0).requests[0]
    size = 2 * replica.max_step_tokens
    workload = generate(plan, BLOCK_TOKENS, 0)
    lone = type(request)(**{
        name: getattr(request, name) for name in type(request).__dataclass_fields__
    } | {"prompt_tokens": size, "output_tokens": 1, "block_hashes": (), "output_hashes": ()})  # fmt: skip
    work = work_of(type(workload)("one", (lone,)), setup)
    chunk = replica.max_step_tokens
    predicted_ms = replica.step.predict_ms(chunk, chunk, 0, chunk * chunk / 2)
    predicted_ms += replica.step.predict_ms(chunk, size, 1, chunk * (chunk + chunk / 2))
    assert work.busy_s * 1e3 == pytest.approx(predicted_ms, rel=0.02)
