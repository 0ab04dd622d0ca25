"""Blocks copied to host memory and back, on a device that works as late as a GPU might, and in an engine."""

import random
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from serving.engine import kv_transfer
from serving.engine.assembly import build_engine
from serving.engine.engine import EngineIdentity
from serving.engine.executor import ExecutorOptions
from serving.engine.kv_transfer import HostKv, PlainCopier
from serving.engine.limits import SchedulerLimits
from serving.engine.plan import BlockCopies
from serving.engine.worker import Worker
from serving.errors import ConfigError
from serving.model_spec import read_model_spec
from serving.models.layers import Shard
from serving.models.llama import Llama
from serving.models.weights import open_weights
from tests.serving.engine.cuda_fakes import LazyDevice
from tests.serving.engine.harness import request
from tests.serving.engine.test_cuda_runner import Rig
from tests.serving.engine.worker_ranks import tensor_parallel
from tests.serving.models.tiny_llama import VOCAB_SIZE, save_tiny_llama

NUM_BLOCKS, NUM_SLOTS = 11, 7
BLOCK_TOKENS = 4
IDENTITY = EngineIdentity(replica_id="r", model="m", region="here", epoch=1)


class KeepingDevice(LazyDevice):
    """Pinned memory is not used anew while copies are on their way: here it never is."""

    def pinned(self, count):
        self._kept = [*getattr(self, "_kept", []), super().pinned(count)]
        return self._kept[-1]


def pairs(rng, sources, targets, count):
    """`count` copies between random places, each target once."""
    chosen = rng.sample(range(targets), count)
    return np.array([(rng.randrange(sources), target) for target in chosen], dtype=np.int32).reshape(-1, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("device", [PlainCopier, KeepingDevice])
@pytest.mark.parametrize("staged_blocks", [1, 3, 100])
def test_every_block_comes_to_where_the_copies_say(monkeypatch, dtype, device, staged_blocks):
    """Many steps' copies, launched without waiting, give what doing them one by one gives, bit for bit;
    with forward passes in between, through a staging buffer of any size, in pieces of host memory."""
    rng, copier = random.Random(staged_blocks), device()
    cache = torch.randint(-99, 99, (2, 2, NUM_BLOCKS, 3, BLOCK_TOKENS, 8)).to(dtype)
    block_bytes = cache[:, :, 0].nbytes
    monkeypatch.setattr(kv_transfer, "STAGING_BYTES", staged_blocks * block_bytes)
    monkeypatch.setattr(kv_transfer, "_PIECE_BYTES", 3 * block_bytes + 1)
    tier = HostKv(cache, NUM_SLOTS, copier)
    blocks = [cache[:, :, block].clone() for block in range(NUM_BLOCKS)]
    slots = [torch.zeros_like(blocks[0]) for _ in range(NUM_SLOTS)]
    tier.run(BlockCopies(np.array([(0, s) for s in range(NUM_SLOTS)], dtype=np.int32), pairs(rng, 1, 1, 0)))
    slots = [blocks[0].clone() for _ in slots]
    for step in range(40):
        spills = pairs(rng, NUM_BLOCKS, NUM_SLOTS, rng.randrange(NUM_SLOTS + 1))
        fetches = pairs(rng, NUM_SLOTS, NUM_BLOCKS, rng.randrange(NUM_BLOCKS + 1))
        tier.run(BlockCopies(spills, fetches))
        spills, fetches = spills.tolist(), fetches.tolist()
        for block, slot in spills:
            slots[slot] = blocks[block].clone()
        for slot, block in fetches:
            blocks[block] = slots[slot].clone()
        written = rng.randrange(NUM_BLOCKS)
        copier.run(lambda written=written, step=step: cache[:, :, written].fill_(step))
        blocks[written].fill_(step)
    if isinstance(copier, KeepingDevice):
        copier.finish()
    for block, content in enumerate(blocks):
        assert torch.equal(cache[:, :, block], content)


def test_a_block_is_one_copy(monkeypatch):
    """Over PCIe a block goes in one piece; a step adds the copy of the blocks' numbers, and a gather."""
    device = KeepingDevice()
    tier = HostKv(torch.zeros(4, 2, NUM_BLOCKS, 3, BLOCK_TOKENS, 8), NUM_SLOTS, device)
    with device.counting() as seen:
        tier.run(BlockCopies(pairs(random.Random(1), NUM_BLOCKS, NUM_SLOTS, 5), pairs(random, 1, 1, 0)))
    assert seen == {"to device": 1, "eager": 1, "to host": 5}
    with device.counting() as seen:
        tier.run(BlockCopies(pairs(random, 1, 1, 0), pairs(random, 1, 1, 0)))
    assert not seen


# ---- in an engine -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> ExecutorOptions:
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny_llama(folder)
    return ExecutorOptions(
        weights=tuple(folder.glob("*.safetensors")),
        spec=read_model_spec(folder),
        block_tokens=BLOCK_TOKENS,
    )


def host_bytes(options: ExecutorOptions, blocks: int) -> int:
    return blocks * options.block_tokens * options.spec.kv_bytes_per_token(4) // options.world_size


def engine_over(worker: Worker, options: ExecutorOptions, max_num_seqs: int = 4):
    limits = SchedulerLimits(max_num_seqs, max_step_tokens=48, max_context_tokens=256)
    return build_engine(
        worker, options.spec, limits, IDENTITY, block_tokens=options.block_tokens, kv_dtype=worker.kv_dtype
    )


def run_all(engine, submits):
    """Outputs by request, and the steps' stats; the engine is checked after every step."""
    outputs, stats = {submit.request_id: () for submit in submits}, []
    replies = engine.submit(submits)
    assert all(reply.__class__.__name__ == "Accepted" for reply in replies), replies
    while (frame := engine.step()) is not None:
        stats.append(frame.stats)
        engine.check_integrity()
        for delta in frame.deltas:
            outputs[delta.request_id] += delta.token_ids
            assert delta.error is None
    return outputs, [s for s in stats if s is not None]


def random_tokens(count: int, seed: int) -> tuple[int, ...]:
    return tuple(random.Random(seed).choices(range(VOCAB_SIZE), k=count))


def turns(options: ExecutorOptions, worker: Worker):
    """Six conversations of three turns, one after the other within a turn: each prompt is all that was
    said before, and something new. Returns all outputs, hits and hits in host memory."""
    engine = engine_over(worker, options)
    texts = [random_tokens(30, seed) for seed in range(6)]
    outputs, hits, host_hits = [], 0, 0
    for turn in range(3):
        for index, text in enumerate(texts):
            said, stats = run_all(engine, [request(f"{turn}-{index}", text, max_tokens=9)])
            outputs.append(said[f"{turn}-{index}"])
            hits += sum(s.prefix_hit_tokens for s in stats)
            host_hits += sum(s.host_hit_tokens for s in stats)
            texts[index] = text + outputs[-1] + random_tokens(7, 100 * turn + index)
    return outputs, hits, host_hits


def test_evicted_prefixes_come_back_bit_for_bit(tiny):
    """Six conversations in a pool for two: with host memory their later turns find all of their past, as
    in a pool that holds everything, and every answer is the same."""
    roomy = turns(tiny, Worker(replace(tiny, kv_blocks=300)))
    small = replace(tiny, kv_blocks=40)
    without = turns(small, Worker(small))
    tiered = turns(small, Worker(replace(small, host_kv_bytes=host_bytes(tiny, 200))))
    assert roomy[0] == without[0] == tiered[0]
    assert roomy[2] == without[2] == 0
    assert tiered[1] == roomy[1] > 2 * without[1]
    assert 0 < tiered[2] <= tiered[1]


def test_a_fetched_block_holds_the_very_bits(tiny):
    """Keys and values after the way to host memory and back equal those that were computed."""
    options = replace(tiny, kv_blocks=12, host_kv_bytes=host_bytes(tiny, 60))
    worker = Worker(options)
    engine = engine_over(worker, options)
    prompt = random_tokens(33, 1)

    def kept(request_id):
        engine.submit([request(request_id, prompt, max_tokens=2)])
        engine.step()
        (sequence,) = engine._scheduler.running
        cache = torch.stack(worker._runner._layer_caches)[:, :, list(sequence.block_table[:8])]
        while engine.step() is not None:
            pass
        return cache

    first = kept("first")
    run_all(engine, [request("other", random_tokens(44, 2), max_tokens=2)])
    again = kept("again")
    assert engine._scheduler.pool.events.last_number > 0
    assert torch.equal(first, again)


def test_preempted_sequences_come_back_from_host_memory(tiny):
    """Those who lost their blocks to others get them copied back: fewer tokens are computed again, and
    every output is what it is without pressure."""
    submits = [request(str(i), random_tokens(20, i), max_tokens=60) for i in range(4)]
    expected, _ = run_all(engine_over(Worker(replace(tiny, kv_blocks=300)), tiny), submits)
    computed = []
    for host_blocks in (0, 100):
        options = replace(tiny, kv_blocks=42, host_kv_bytes=host_bytes(tiny, host_blocks) or None)
        engine = engine_over(Worker(options), options)
        engine._scheduler._growth.has_room = lambda running, waiting: True  # it admits whatever fits now
        fetched, schedule = [], engine._scheduler.schedule

        def spy(*args, schedule=schedule, fetched=fetched):
            step = schedule(*args)
            if step is not None:
                fetched.append(len(step.copies.fetches))
            return step

        engine._scheduler.schedule = spy
        outputs, stats = run_all(engine, submits)
        assert outputs == expected
        assert sum(s.num_preemptions for s in stats) > 0
        assert sum(s.host_hit_tokens for s in stats) == 0, "hits are of prompts that come for the first time"
        assert (sum(fetched) > 0) == (host_blocks > 0)
        computed.append(sum(s.prefill_tokens for s in stats))
    assert computed[1] < computed[0]


def test_ranks_copy_alike(tiny):
    """Split over two ranks, each keeps its heads' part of a block; the answers are one rank's."""
    small = replace(tiny, kv_blocks=40, host_kv_bytes=host_bytes(tiny, 200))
    expected = turns(small, Worker(small))
    with tensor_parallel(small, 2) as (worker, _):
        assert worker.num_host_blocks == 2 * 200
        assert turns(small, worker) == expected


@dataclass
class TieredRig(Rig):
    """The runner that launches ahead, with host memory, on one stream."""

    num_host_blocks: int = 60

    def __post_init__(self):
        super().__post_init__()
        self.host_kv = HostKv(self.cache, self.num_host_blocks, self.device)

    def launch(self, plan, sampling):
        self.host_kv.run(plan.copies)
        return super().launch(plan, sampling)


def test_copies_keep_their_place_among_steps_launched_ahead(tiny):
    """Steps are scheduled, launched and replayed before those in front of them have run, and blocks spilled
    and fetched in between: every answer is the one that a patient run in a roomy pool gives."""
    options = replace(tiny, block_tokens=16)
    source = open_weights(options.weights, options.spec, torch.float32)
    rig = TieredRig(Llama(options.spec, source, torch.device("cpu"), Shard()), KeepingDevice())
    said = []
    for executor, size in ((Worker(replace(options, kv_blocks=100)), 100), (rig, 12)):
        limits = SchedulerLimits(max_num_seqs=4, max_step_tokens=48, max_context_tokens=256)
        engine = build_engine(
            executor,
            options.spec,
            limits,
            IDENTITY,
            block_tokens=16,
            kv_dtype="float32",
            num_blocks=size,
        )
        texts, outputs, host_hits = [random_tokens(40, seed) for seed in range(5)], [], 0
        for turn in range(3):
            submits = [request(f"{turn}{i}", text, max_tokens=14) for i, text in enumerate(texts)]
            answers, stats = run_all(engine, submits)
            outputs.append(answers)
            host_hits += sum(s.host_hit_tokens for s in stats)
            texts = [text + answers[f"{turn}{i}"] for i, text in enumerate(texts)]
        said.append(outputs)
    assert said[0] == said[1]
    assert host_hits > 200 and rig.device.seen["replay"] > 10


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"host_kv_bytes": 10}, "host_kv_bytes: 10 does not hold one KV block of .*raise it"),
        ({"host_kv_bytes": 1 << 60}, "host_kv_bytes: .* MiB of host memory are asked for, a rank can have"),
    ],
)
def test_host_memory_that_cannot_be_is_a_config_error(tiny, changes, message):
    """The error names the key, the numbers, and what to change."""
    with pytest.raises(ConfigError, match=message):
        Worker(replace(tiny, kv_blocks=8, **changes))


def test_the_sizing_tells_of_host_memory(tiny):
    """Blocks kept on the host are told with their memory, and cost the pool their staging."""
    worker = Worker(replace(tiny, kv_blocks=8, host_kv_bytes=host_bytes(tiny, 1000)))
    lines = worker.kv_sizing.lines(BLOCK_TOKENS)
    assert lines[-1].startswith("blocks more, in ") and lines[-1].endswith(" 1000")
    assert any(line.startswith("- blocks on their way to host memory") for line in lines)


def gpu_options(folder, kv_blocks: int) -> ExecutorOptions:
    """A small model that the GPU's kernels can run."""
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    save_tiny_llama(folder, hidden_size=64, num_attention_heads=2, num_key_value_heads=1, head_dim=64)
    return ExecutorOptions(
        weights=tuple(folder.glob("*.safetensors")),
        spec=read_model_spec(folder),
        dtype="float16",
        device="cuda",
        kv_blocks=kv_blocks,
        max_num_seqs=4,
    )


@pytest.mark.gpu
def test_on_a_gpu_evicted_prefixes_come_back(tmp_path):
    """Through pinned memory and one stream, among graphs and eager steps: the answers of a roomy pool."""
    roomy = gpu_options(tmp_path, kv_blocks=300)
    small = replace(roomy, kv_blocks=12, host_kv_bytes=host_bytes(roomy, 200))
    expected, tiered = turns(roomy, Worker(roomy)), turns(small, Worker(small))
    assert expected[:2] == tiered[:2] and tiered[2] > 0
