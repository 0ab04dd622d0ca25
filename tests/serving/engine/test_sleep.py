"""Asleep, an engine holds no memory of the device's; awake again, it answers as if nothing had been."""

import time
from dataclasses import dataclass, replace

import pytest
import torch

import kernels.linear
from serving.engine.block_pool import BlockPool
from serving.engine.engine import Engine
from serving.engine.executor import ExecutorOptions
from serving.engine.host_tier import HostTier
from serving.engine.kv_sizing import check_can_sleep, check_can_wake
from serving.engine.kv_transfer import PlainCopier
from serving.engine.limits import SchedulerLimits
from serving.engine.parked_weights import ParkedWeights, tensors_of
from serving.engine.plan import NO_COPIES
from serving.engine.scheduler import Scheduler
from serving.engine.step_time import StepTimeModel
from serving.engine.worker import Worker
from serving.errors import ConfigError
from serving.model_spec import read_model_spec
from tests.fakes import FakeExecutor
from tests.serving.engine.harness import VOCAB_SIZE, expected_outputs, request
from tests.serving.engine.test_engine import IDENTITY, Running, collect
from tests.serving.engine.test_kv_transfer import (
    BLOCK_TOKENS,
    KeepingDevice,
    engine_over,
    gpu_options,
    host_bytes,
    random_tokens,
    run_all,
)
from tests.serving.engine.test_step_time import SMOLLM2
from tests.serving.engine.worker_ranks import tensor_parallel
from tests.serving.models.tiny_llama import save_tiny_llama

# ---- weights ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    whole: torch.Tensor
    view: torch.Tensor  # of `whole`


class Model:
    """Tensors held in every way in which models hold theirs."""

    def __init__(self):
        whole = torch.randn(7, 5)
        self.parts = [
            Part(whole, whole[2:4]),
            Part(torch.randn(3).bfloat16(), torch.ones(1, dtype=torch.int8)),
        ]
        self.tied = whole.t()
        self.named = {"norm": (torch.randn(11),)}
        self.size = 3


Model.__module__ = "serving.models.a_model"


def contents(model):
    return [tensor.clone() for tensor in tensors_of(model)]


def test_weights_come_back_bit_for_bit():
    """Whatever the dtype and the length in bytes; views and tied tensors are parked once, and stay such."""
    model = Model()
    device = KeepingDevice()
    before, tensors = contents(model), list(tensors_of(model))
    parked = ParkedWeights(model, device)
    assert parked.nbytes == 7 * 5 * 4 + 3 * 2 + 1 + 11 * 4
    for sleep in range(3):
        with device.counting() as seen:
            parked.park()
        assert seen == ({"to host": 4} if sleep == 0 else {}), "they never change: later sleeps copy nothing"
        assert all(tensor.untyped_storage().nbytes() == 0 for tensor in tensors)
        parked.restore()
        device.finish()
        assert all(map(torch.equal, contents(model), before))
    model.parts[0].whole.fill_(1)
    assert model.tied.eq(1).all() and model.parts[0].view.eq(1).all()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> ExecutorOptions:
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny_llama(folder)
    return ExecutorOptions(
        weights=tuple(folder.glob("*.safetensors")),
        spec=read_model_spec(folder),
        block_tokens=BLOCK_TOKENS,
        kv_blocks=40,
        host_kv_bytes=200 * BLOCK_TOKENS * read_model_spec(folder).kv_bytes_per_token(4),
        sleeps=True,
    )


@pytest.fixture
def plain_weights(monkeypatch):
    """As on a GPU: weights in torch's own layout and memory."""
    monkeypatch.setattr(kernels.linear, "_onednn_serves", lambda weight: False)


def test_every_weight_of_a_model_is_found(tmp_path, tiny, plain_weights):
    """What is parked is all the model has: as many bytes as its parameters, and the rotary frequencies."""
    reference = save_tiny_llama(tmp_path)
    worker = Worker(tiny)
    found = {tensor.untyped_storage().data_ptr(): tensor for tensor in tensors_of(worker._model)}
    expected = sum(parameter.nbytes for parameter in reference.parameters()) + tiny.spec.head_dim // 2 * 4
    assert sum(tensor.nbytes for tensor in found.values()) == expected


def test_a_worker_that_has_slept_answers_the_same(tiny, plain_weights):
    """Twice, and with prefixes that were in the pool when it fell asleep: host memory kept them."""
    worker = Worker(tiny)
    engine = engine_over(worker, tiny)
    prompts = [random_tokens(30, seed) for seed in range(3)]

    def ask(name):
        return run_all(engine, [request(f"{name}{i}", prompt) for i, prompt in enumerate(prompts)])

    expected, _ = ask("a")
    for name in "bc":
        engine._fall_asleep()
        assert not hasattr(worker, "_runner") and not hasattr(worker._host_kv, "_blocks")
        assert any(t.untyped_storage().nbytes() == 0 for t in tensors_of(worker._model))
        assert engine.load().asleep and engine.load().blocks_free == 40
        worker.wake()
        engine._is_asleep = False
        outputs, stats = ask(name)
        assert list(outputs.values()) == list(expected.values())
        assert sum(s.host_hit_tokens for s in stats) == sum(s.prefix_hit_tokens for s in stats) > 60


def test_all_ranks_sleep(tiny):
    """Rank 0 tells the others; all of them wake, and give the same tokens."""
    options = replace(tiny, host_kv_bytes=host_bytes(tiny, 100))
    submit = request("a", random_tokens(20, 1))
    with tensor_parallel(options, 2) as (worker, _):
        expected, _ = run_all(engine_over(worker, options), [submit])
        worker.sleep(NO_COPIES)
        worker.keep_alive()
        worker.wake()
        assert run_all(engine_over(worker, options), [submit])[0] == expected


def test_memory_that_is_gone_is_said():
    """Who cannot sleep is told at the start, who cannot wake when it tries: with sums and what to do."""
    mib = 1 << 20
    check_can_wake(60 * mib, 30 * mib, 20 * mib, 10 * mib)
    with pytest.raises(ConfigError, match=r"needs 61 MiB on its device, .* and 60 MiB are free: something"):
        check_can_wake(60 * mib, 31 * mib, 20 * mib, 10 * mib)
    check_can_sleep(30 * mib, 30 * mib)
    with pytest.raises(ConfigError, match="keeps 31 MiB of weights in host memory, and can have 30 MiB"):
        check_can_sleep(31 * mib, 30 * mib)


# ---- the engine's idle wait ---------------------------------------------------------------------


class Sleeper(FakeExecutor):
    """Writes down when it slept and woke."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.log = []

    def launch(self, plan, sampling):
        self.log.append("step")
        return super().launch(plan, sampling)

    def sleep(self, copies):
        super().sleep(copies)
        self.log.append("sleep")

    def wake(self):
        super().wake()
        self.log.append("wake")


class Asleep(Running):
    """An engine that falls asleep after a few milliseconds."""

    sleep_after_s = 0.03

    def _run(self):
        try:
            self.engine.run(self.frames.append, self._idle, self.sleep_after_s)
        except RuntimeError as failure:
            self.failure = failure


def make_engine(host_blocks=0, executor=None):
    executor = executor or Sleeper(64, 4, VOCAB_SIZE, num_host_blocks=host_blocks)
    pool = BlockPool(64, 4, HostTier(host_blocks) if host_blocks else None)
    limits = SchedulerLimits(max_num_seqs=8, max_step_tokens=16, max_context_tokens=1000)
    step_time = StepTimeModel(SMOLLM2, "float32")
    return Engine(Scheduler(pool, limits), executor, step_time, IDENTITY), executor


@pytest.mark.parametrize("host_blocks", [0, 100])
def test_an_idle_engine_sleeps_until_a_request_comes(host_blocks):
    """Once, whatever else is told meanwhile; the load says so, and what was cached and is kept nowhere is
    removed for whoever follows the events."""
    engine, executor = make_engine(host_blocks)
    prompt = tuple(range(30))
    with Asleep(engine, idle=lambda: None) as running:
        for name in "ab":
            engine.submit([request(name, prompt, max_tokens=3)])
            running.wait_for(lambda name=name: name in collect(list(running.frames))[1])
            running.wait_for(lambda: running.frames[-1].load.asleep)
            engine.drain()
            time.sleep(3 * Asleep.sleep_after_s)
            assert running.frames[-1].load.asleep and running.frames[-1].load.blocks_free == 64
            kept = engine.block_snapshot().block_hashes
            assert len(kept) == (8 if host_blocks else 0)
    outputs, ends = collect(running.frames)
    assert ends == {"a": ["length"], "b": ["length"]}
    assert outputs["a"] == outputs["b"] == expected_outputs(request("a", prompt, max_tokens=3), 256, 1000)[0]
    assert [e for e in executor.log if e != "step"] == ["sleep", "wake", "sleep"]
    hits = sum(frame.stats.host_hit_tokens for frame in running.frames if frame.stats)
    assert hits == (28 if host_blocks else 0)
    events = [event for frame in running.frames if frame.block_events for event in frame.block_events.events]
    assert len(events) == (8 if host_blocks else 32)


def test_an_engine_with_work_does_not_sleep():
    """A request that comes in the very moment keeps it awake."""
    engine, executor = make_engine()
    engine.submit([request("a", (1, 2, 3))])
    engine._fall_asleep()
    assert executor.log == [] and not engine.load().asleep


def test_without_a_time_to_sleep_after_nobody_does():
    """The default."""
    engine, executor = make_engine()
    with Running(engine) as running:
        running.wait_for(lambda: running.frames)
        time.sleep(0.1)
    assert executor.log == []


def test_who_cannot_wake_tells_its_requests():
    """The error is raised, after the request that should have woken it was told that it is lost."""

    class Robbed(Sleeper):
        def wake(self):
            raise RuntimeError("memory is gone")

    engine, _ = make_engine(executor=Robbed(64, 4, VOCAB_SIZE))
    with Asleep(engine) as running:
        running.wait_for(lambda: running.frames and running.frames[-1].load.asleep)
        engine.submit([request("a", (1, 2, 3))])
        running.wait_for(lambda: running.failure is not None)
    assert str(running.failure) == "memory is gone"
    assert collect(running.frames)[1] == {"a": ["lost"]}


@pytest.mark.gpu
def test_a_gpus_memory_is_given_back(tmp_path):
    """Asleep next to nothing is left of weights, KV and graphs; awake, the same tokens come of new graphs."""
    options = replace(gpu_options(tmp_path, kv_blocks=200_000), sleeps=True)
    worker = Worker(options)
    engine = engine_over(worker, options)
    submits = [request(str(i), random_tokens(40, i), max_tokens=30) for i in range(4)]
    expected, _ = run_all(engine, submits)
    used = torch.cuda.memory_reserved()
    for _ in range(2):
        engine._fall_asleep()
        assert torch.cuda.memory_reserved() < used / 4
        worker.wake()
        engine._is_asleep = False
        assert run_all(engine, submits)[0] == expected
    assert torch.cuda.memory_reserved() <= used * 1.1


def test_plain_memory_needs_no_waiting():
    """On a CPU copies are done when they are asked for."""
    copier = PlainCopier()
    source, target = copier.ints(3).fill_(7), copier.pinned(3)
    copier.copy(source, target)
    copier.mark().synchronize()
    assert target.tolist() == [7, 7, 7]
