"""The mock engine: the engine's own bookkeeping over an executor that waits and makes tokens up."""

import subprocess
import sys
import time

import msgspec
import numpy as np
import pytest

from serving.config import MockEngineConfig, parse_config
from serving.engine.assembly import build_engine
from serving.engine.engine import EngineIdentity
from serving.engine.executor import ExecutorOptions
from serving.engine.limits import SchedulerLimits
from serving.engine.mock_executor import COMMON_TOKENS, MockExecutor
from serving.engine.plan import SamplingBatch
from serving.engine.step_time import StepShape
from serving.errors import ConfigError
from serving.messages import Accepted, Refused
from tests.serving.engine.harness import request
from tests.serving.engine.test_step_time import SMOLLM2

END = 2
SPEC = msgspec.structs.replace(SMOLLM2, eos_token_ids=(END,))
IDENTITY = EngineIdentity(replica_id="r1", model="m", region="here", epoch=7)


class MockEngine:
    """An engine over a mock executor whose sleeping only moves a clock."""

    def __init__(self, num_blocks=64, max_num_seqs=8, **config):
        self.now_s = 0.0
        self.sleeps_ms = []
        options = ExecutorOptions(
            weights=(), spec=SPEC, dtype="bfloat16", kv_blocks=num_blocks, mock=MockEngineConfig(**config)
        )
        self.executor = MockExecutor(options, sleep=self._sleep)
        limits = SchedulerLimits(max_num_seqs, max_step_tokens=64, max_context_tokens=2000)
        self.engine = build_engine(
            self.executor,
            SPEC,
            limits,
            IDENTITY,
            block_tokens=16,
            kv_dtype="bfloat16",
            machine=self.executor.measure_machine(),
            clock=self.clock,
        )
        self.outputs, self.ends, self.num_preemptions = {}, {}, 0

    def clock(self):
        return self.now_s

    def _sleep(self, seconds):
        self.sleeps_ms.append(seconds * 1e3)
        self.now_s += seconds

    def run(self, submits=()):
        """Submit, and step until nothing is left to do."""
        self.engine.submit(list(submits))
        while (frame := self.engine.step()) is not None:
            self.engine.check_integrity()
            self.num_preemptions += frame.stats.num_preemptions if frame.stats else 0
            for delta in frame.deltas:
                self.outputs[delta.request_id] = self.outputs.get(delta.request_id, ()) + delta.token_ids
                if delta.finish_reason is not None:
                    self.ends[delta.request_id] = delta.finish_reason
        return self


def batch(*places):
    """Sampling controls of rows at these (seed, position)."""
    seeds, positions = zip(*places, strict=True)
    zeros, whole = np.zeros(len(places), np.float32), np.zeros(len(places), np.int32)
    return SamplingBatch(
        zeros, whole, zeros + 1, zeros, np.array(seeds, np.uint64), np.array(positions, np.int32)
    )


def prompt(number, num_tokens=20):
    """Tokens that share no block with another number's."""
    return tuple(number * 1000 + at for at in range(num_tokens))


def test_a_token_is_a_function_of_seed_and_position():
    """The given ids in turn from where the seed says, whatever else is in the batch and in the prompt."""
    engine = MockEngine(token_ids=(7, 8, 9))
    engine.run([request("a", prompt(1, 20), 4, seed=1), request("b", prompt(2, 33), 4, seed=2**64 - 1)])
    assert engine.outputs == {
        "a": (7, 8, 9, 7),
        "b": tuple((7, 8, 9)[(2**64 - 1 + at) % 2**64 % 3] for at in range(33, 37)),
    }
    alone = MockEngine(token_ids=(7, 8, 9)).run([request("a", prompt(5, 20), 4, seed=1)])
    assert alone.outputs["a"] == engine.outputs["a"]


def test_by_default_common_words_are_emitted(embedded_model):
    """Ids of the embedded vocabulary that spell something, nearly all of them in ASCII."""
    engine = MockEngine().run([request("a", prompt(1), 600, seed=5)])
    assert set(engine.outputs["a"]) <= set(COMMON_TOKENS) and len(set(engine.outputs["a"])) == 600


def test_a_step_takes_the_configured_milliseconds():
    """Each sleep is the coefficients' prediction for that step's sizes, prefill chunks and decodes mixed."""
    engine = MockEngine(
        base_ms=5, per_token_ms=0.5, per_kv_token_ms=0.01, per_logit_ms=0.3, per_pair_ms=0.001
    )
    expected = []
    observe = engine.engine._observe

    def watched(flight, finished_s):
        shape = StepShape.of(flight.step)
        expected.append(
            5
            + 0.5 * shape.tokens
            + 0.01 * shape.kv_tokens
            + 0.3 * shape.num_logits
            + 0.001 * shape.attention_pairs
        )
        return observe(flight, finished_s)

    engine.engine._observe = watched
    engine.run([request(str(n), prompt(n, 7 * n + 1), max_tokens=5 * n, seed=n) for n in range(1, 9)])
    assert len({round(ms, 3) for ms in expected}) > 10
    assert engine.sleeps_ms == pytest.approx(expected, abs=2.0)  # less what the executor itself took
    assert all(slept <= ms for slept, ms in zip(engine.sleeps_ms, expected, strict=True))


@pytest.mark.parametrize("per_token_ms", [0.0, 0.1, 3.0])
def test_load_reports_foretell_the_first_step(per_token_ms):
    """A fleet whose replicas began with some other guess would send all to the first that has learned."""
    first = MockEngine(base_ms=15, per_token_ms=per_token_ms).engine.load().step
    for tokens in (1, 30, 400):
        assert first.predict_ms(tokens, 0) == pytest.approx(15 + per_token_ms * tokens, rel=0.01)


def test_load_reports_learn_the_configured_milliseconds():
    """What they say of a step comes to what the config says, from the steps alone."""
    engine = MockEngine(base_ms=30, per_token_ms=0.5, per_kv_token_ms=0.02)
    for number in range(1, 60):
        engine.run(
            [request(f"{number}-{n}", prompt(n, 5 + number * n % 50), 6) for n in range(number % 8 + 1)]
        )
    learned = engine.engine.load().step
    for tokens, kv_tokens in ((1, 50), (4, 200), (8, 400), (40, 100), (64, 300)):
        true_ms = 30 + 0.5 * tokens + 0.02 * kv_tokens
        assert learned.predict_ms(tokens, kv_tokens, min(tokens, 8), 0) == pytest.approx(true_ms, rel=0.1)


def test_a_sleeping_step_burns_no_cpu():
    """In real time: ten steps of 20 ms take 200 ms, and a small part of it of the CPU's."""
    options = ExecutorOptions(weights=(), spec=SPEC, dtype="bfloat16", mock=MockEngineConfig(base_ms=20))
    executor = MockExecutor(options)
    engine = build_engine(
        executor, SPEC, SchedulerLimits(8, 64, 2000), IDENTITY, block_tokens=16, kv_dtype="bfloat16"
    )
    engine.submit([request("a", prompt(1), max_tokens=10)])
    started_s, cpu_s = time.perf_counter(), time.thread_time()
    while engine.step() is not None:
        pass
    assert time.perf_counter() - started_s >= 0.2
    assert time.thread_time() - cpu_s < 0.1


def test_replies_have_the_mean_length_and_end_by_stop():
    """400 replies of 25 tokens in the mean: a geometric law's mean and deviation, and seeds repeat them."""
    engine = MockEngine(num_blocks=2000, max_num_seqs=64, mean_output_tokens=25)
    submits = [
        request(str(n), prompt(n), max_tokens=1000, seed=n * 7919, stop_token_ids=(END,)) for n in range(400)
    ]
    engine.run(submits)
    assert set(engine.ends.values()) == {"stop"}
    lengths = np.array([len(tokens) for tokens in engine.outputs.values()])
    assert lengths.mean() == pytest.approx(25, abs=4 * 25 / 20)  # four standard errors
    assert lengths.std() == pytest.approx(25, rel=0.3)
    again = MockEngine(num_blocks=500, mean_output_tokens=25).run(submits[:50])
    assert all(again.outputs[str(n)] == engine.outputs[str(n)] for n in range(50))


def test_who_ignores_the_end_runs_to_the_limit():
    """The end token is only a token to a request that does not stop at it; so are all by default."""
    ignoring = MockEngine(mean_output_tokens=5).run([request("a", prompt(1), 80)])
    assert END in ignoring.outputs["a"] and len(ignoring.outputs["a"]) == 80
    default = MockEngine().run([request("a", prompt(1), 80, stop_token_ids=(END,))])
    assert default.ends == {"a": "length"} and len(default.outputs["a"]) == 80


def test_blocks_are_counted_as_with_a_model():
    """A full pool refuses with its headroom, takes the request when there is room, and finds prefixes."""
    engine = MockEngine(num_blocks=10)
    first, second = (request(name, prompt(1, 40), 40, reserve_blocks=6) for name in "ab")
    assert isinstance(engine.engine.submit([first])[0], Accepted)
    (refused,) = engine.engine.submit([second])
    assert isinstance(refused, Refused) and refused.headroom_blocks == 4 and not refused.permanent
    engine.run()
    (accepted,) = engine.engine.submit([second])
    assert isinstance(accepted, Accepted) and accepted.matched_blocks == 2
    engine.run()
    assert engine.outputs["a"] == engine.outputs["b"]


def test_a_preemption_changes_no_token():
    """Eight that reserve nothing outgrow a small pool: some are put back, and all get the same tokens."""
    submits = [request(str(n), prompt(n, 16), max_tokens=120, seed=n) for n in range(8)]
    small, large = MockEngine(num_blocks=24).run(submits), MockEngine(num_blocks=500).run(submits)
    assert small.outputs == large.outputs and large.num_preemptions == 0
    assert small.engine.load().blocks_reserved == 0


def test_the_pool_is_as_large_as_it_is_told():
    """Blocks as configured; else those that the model's KV would fill the memory limit with."""

    def blocks(**options):
        return MockExecutor(ExecutorOptions(weights=(), spec=SPEC, dtype="bfloat16", **options)).num_blocks

    assert blocks(kv_blocks=17) == 17
    assert blocks(kv_memory_bytes=100 * 16 * SPEC.kv_bytes_per_token(2)) == 100
    assert blocks() == (1 << 30) // (16 * SPEC.kv_bytes_per_token(2))


def test_ids_outside_the_vocabulary_are_refused():
    """A client could not be sent them; the error names the key."""
    with pytest.raises(ConfigError, match=r"engine\.mock\.token_ids: .* ends at 49151"):
        MockEngine(token_ids=(5, 49152))


@pytest.mark.parametrize(
    ("engine", "said"),
    [
        ({"mock": {"base": 3}}, "unknown key 'engine.mock.base'"),
        ({"mock": {"base_ms": -1}}, "engine.mock.base_ms: "),
        ({"mock": {}, "tensor_parallel": 3}, "mock: has one rank"),
        ({"mock": {}, "executor": "a:b"}, "leave out executor"),
    ],
)
def test_a_config_that_contradicts_itself_is_refused(engine, said):
    """Unknown keys, and options that a mock engine would drop in silence."""
    with pytest.raises(ConfigError) as refused:
        parse_config({"engine": engine}, "test")
    assert said in str(refused.value)


def test_it_needs_no_torch():
    """A rank with a mock engine loads only what it uses, so that many start at once on a laptop."""
    code = "import sys, serving.rank, serving.engine.mock_executor; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
