"""The engine under test: runs, their records, and how far one dtype is from another."""

from dataclasses import replace

import numpy as np
import pytest
from safetensors import safe_open

from serving.bench.engine import peer_weights, prefix, quality
from serving.bench.engine.offline import BenchRequest, EngineSetup, EngineUnderTest
from serving.bench.engine.prompts import Windows, instructions
from serving.engine.limits import SchedulerLimits
from serving.errors import ConfigError
from serving.model_spec import read_model_spec
from tests.serving.engine.step_plans import generate
from tests.serving.models.tiny_llama import VOCAB_SIZE, save_tiny_llama

BLOCK_TOKENS = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    save_tiny_llama(path)
    (path / "tokenizer.json").write_text("{}")
    return path


@pytest.fixture(scope="module")
def tiny(folder):
    setup = EngineSetup(str(folder), "float32", threads=1, kv_blocks=64, block_tokens=BLOCK_TOKENS)
    with EngineUnderTest(setup) as under_test:
        yield under_test


class ByteTokenizer:
    def encode(self, text: str, add_special: bool) -> list[int]:
        return list(text.encode())


def prompts(count: int, num_tokens: int = 20) -> list[tuple[int, ...]]:
    drawn = np.random.default_rng(count).integers(0, VOCAB_SIZE, (count, num_tokens))
    return [tuple(ids) for ids in drawn.tolist()]


def test_a_run_gives_each_request_its_tokens(tiny):
    """Outputs are the model's greedy ones, all of them, each at a time; every step is recorded."""
    tiny.rebuild()
    asked = prompts(5)
    record = tiny.run([BenchRequest(prompt, max_tokens=6) for prompt in asked])
    expected = generate(tiny.worker, [list(prompt) for prompt in asked], 6, BLOCK_TOKENS)
    assert [list(request.output_ids) for request in record.requests] == expected
    for request in record.requests:
        assert (request.finish_reason, request.cached_tokens) == ("length", 0)
        assert len(request.token_times_s) == 6
        assert list(request.token_times_s) == sorted(request.token_times_s)
        assert request.submitted_s < request.first_token_s == request.token_times_s[0] <= record.elapsed_s
    assert len(record.steps) == len(record.forward_ms) == 6
    assert all(
        0 < forward < step.step_ms for step, forward in zip(record.steps, record.forward_ms, strict=True)
    )


def test_refused_requests_wait_their_turn(tiny):
    """In a pool for two at a time all are served, in order, and nobody before it has arrived."""
    tiny.rebuild(num_blocks=4)
    requests = [BenchRequest(prompt, max_tokens=4) for prompt in prompts(6)]
    record = tiny.run([*requests, BenchRequest(prompts(7)[0], 4, arrival_s=0.3)])
    firsts = [request.first_token_s for request in record.requests]
    assert firsts == sorted(firsts) and len(set(firsts[:6])) >= 3
    assert record.requests[6].submitted_s == 0.3 < firsts[6]
    assert max(step.batch_size for step in record.steps) <= 2


def test_a_request_no_pool_holds_is_refused_for_good(tiny):
    """The run fails with the reason instead of waiting forever."""
    tiny.rebuild(num_blocks=4)
    with pytest.raises(ConfigError, match="can never run here"):
        tiny.run([BenchRequest(prompts(1, 100)[0], max_tokens=4)])


def test_limits_can_change_without_loading_again(tiny):
    """A rebuilt engine keeps to its new limits, and has forgotten what was cached."""
    tiny.rebuild(scheduler_limits=SchedulerLimits(3, 16, 256))
    requests = [BenchRequest(prompt, max_tokens=4) for prompt in prompts(6)]
    record = tiny.run(requests)
    assert max(step.batch_size for step in record.steps) <= 3
    assert max(step.prefill_tokens + step.decode_tokens for step in record.steps) <= 16
    assert tiny.run(requests[:1]).requests[0].cached_tokens == BLOCK_TOKENS
    tiny.rebuild()
    assert tiny.run(requests[:1]).requests[0].cached_tokens == 0


def test_a_model_does_not_differ_from_itself(tiny):
    """KL 0 and full agreement, with prompts of different lengths, whatever a step's shape."""
    found = quality.compare(tiny, tiny, [*prompts(3, 20), *prompts(2, 5)])
    assert [entry.way for entry in found] == ["decode", "prefill"]
    for entry in found:
        assert (entry.mean_kl, entry.agreement) == (pytest.approx(0, abs=1e-12), 1.0)
        assert entry.positions == 5 * quality.NEW_TOKENS


def test_both_ways_see_the_same_loss(tiny, folder):
    """bfloat16 differs a little, by as much decoding as in one pass over the same tokens."""
    setup = EngineSetup(str(folder), "bfloat16", threads=1, kv_blocks=64, block_tokens=BLOCK_TOKENS)
    with EngineUnderTest(setup) as candidate:
        decode, prefill = quality.compare(tiny, candidate, prompts(8))
    assert 0 < decode.mean_kl < 0.05
    assert prefill.mean_kl == pytest.approx(decode.mean_kl, rel=0.5)
    assert decode.p99_kl > decode.mean_kl


def test_quality_is_judged_by_both_limits():
    """Too much divergence and too little agreement each fail."""
    figures = dict(dtype="int8", way="decode", prompts=200, positions=6400, p99_kl=0.1)
    for mean_kl, agreement, holds in ((0.01, 0.96, [True, True]), (0.03, 0.94, [False, False])):
        judged = quality.verdicts(quality.Quality(mean_kl=mean_kl, agreement=agreement, **figures))
        assert [verdict.holds for verdict in judged] == holds


def test_cached_prompts_start_sooner(tiny):
    """Nine tenths of each second prompt come from the cache, nothing of a first."""
    drawn = np.random.default_rng(5)

    def take(num_tokens: int) -> tuple[int, ...]:
        return tuple(drawn.integers(0, VOCAB_SIZE, num_tokens).tolist())

    tiny.rebuild()
    found = prefix.measure(tiny, take, prompt_tokens=200, repeats=2)
    assert found.cached_tokens == 176
    assert found.ratio == found.cached_ttft_ms / found.cold_ttft_ms > 0


def test_evicted_prompts_come_back_from_host_memory(folder):
    """In a pool for one prompt another one evicts it; with host memory nine tenths are still cached, and
    without it the measure says that they are not."""
    drawn = np.random.default_rng(6)

    def take(num_tokens: int) -> tuple[int, ...]:
        return tuple(drawn.integers(0, VOCAB_SIZE, num_tokens).tolist())

    setup = EngineSetup(str(folder), "float32", threads=1, kv_blocks=14, block_tokens=BLOCK_TOKENS)
    with EngineUnderTest(replace(setup, host_kv_bytes=64 << 20)) as under_test:
        found = prefix.measure(under_test, take, prompt_tokens=200, repeats=1)
    assert found.is_in_host_memory and found.cached_tokens == 176
    with EngineUnderTest(setup) as under_test, pytest.raises(ConfigError, match="or host_kv_bytes"):
        prefix.measure(under_test, take, prompt_tokens=200, repeats=1)


def test_prompts_never_share_a_block():
    """Windows have the length asked for, and differ within their first block."""
    windows = Windows(ByteTokenizer())
    taken = [windows.take(200) for _ in range(100)]
    assert {len(prompt) for prompt in taken} == {200}
    assert len({prompt[:BLOCK_TOKENS] for prompt in taken}) == 100


def test_instructions_are_two_hundred_different_ones():
    """The same ones every time, and a few of them are the first of all."""
    assert len(set(instructions(200))) == 200
    assert instructions(3) == instructions(200)[:3]


def test_peers_are_given_every_tensor(folder):
    """The names and shapes of a saved model are those its peers' copy is made of."""
    with safe_open(folder / "model.safetensors", framework="pt") as saved:
        stored = {name: tuple(saved.get_slice(name).get_shape()) for name in saved.keys()}  # noqa: SIM118
    assert peer_weights.tensor_shapes(read_model_spec(folder)) == stored
