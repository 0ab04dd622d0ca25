"""One rank: its KV pool, its answers, and tensor-parallel groups of small models."""

import ctypes
import threading
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist

from serving.engine.executor import ExecutorOptions
from serving.engine.worker import Worker
from serving.errors import ConfigError
from serving.model_spec import read_model_spec
from tests.serving.engine.step_plans import Span, generate, greedy, step_plan
from tests.serving.engine.worker_ranks import free_rendezvous, start, step_and_die, tensor_parallel
from tests.serving.models.tiny_llama import VOCAB_SIZE, save_tiny_llama

BLOCK_TOKENS = 8


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> ExecutorOptions:
    """A random Llama of 4 query and 2 KV heads, untied."""
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny_llama(folder)
    return ExecutorOptions(
        weights=tuple(folder.glob("*.safetensors")),
        spec=read_model_spec(folder),
        dtype="float32",
        block_tokens=BLOCK_TOKENS,
        kv_blocks=600,
    )


def random_prompts(lens: list[int]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, VOCAB_SIZE, (n,), generator=generator).tolist() for n in lens]


PROMPTS = random_prompts([1, 2, 7, 8, 9, 31, 64, 150])


@pytest.mark.parametrize("chunk_tokens", [1, 7, 64])
def test_chunks_and_batches_do_not_change_tokens(tiny, chunk_tokens):
    """Greedy tokens are the same for prompts alone and whole, and batched and in chunks."""
    worker = Worker(tiny)
    alone = [generate(worker, [prompt], 12, BLOCK_TOKENS)[0] for prompt in PROMPTS]
    assert generate(worker, PROMPTS, 12, BLOCK_TOKENS, chunk_tokens) == alone


def test_two_ranks_give_one_ranks_tokens(tiny):
    """Split over two ranks the model gives the same greedy tokens, also from a plan too long for one
    message; in between the other rank sleeps, is kept alive, and at the end stops."""
    prompts = PROMPTS + random_prompts([200] * 15)
    expected = generate(Worker(tiny), prompts, 6, BLOCK_TOKENS)
    plan = step_plan([Span(prompt, 0, [0] * 26) for prompt in prompts], BLOCK_TOKENS)
    assert len(plan.pack()) > 8192
    with tensor_parallel(tiny, 2) as (worker, (other,)):
        assert worker.block_bytes == BLOCK_TOKENS * tiny.spec.kv_bytes_per_token(4) // 2
        assert generate(worker, prompts, 6, BLOCK_TOKENS) == expected
        busy_s = sum(psutil.Process(other.pid).cpu_times()[:2])
        worker.keep_alive()
        time.sleep(1)
        worker.keep_alive()
        assert sum(psutil.Process(other.pid).cpu_times()[:2]) - busy_s < 0.2, "an idle rank must not spin"
        assert generate(worker, PROMPTS, 3, BLOCK_TOKENS) == [line[:3] for line in expected[: len(PROMPTS)]]
    assert not dist.is_initialized()


def test_follow_raises_when_rank_0_dies(tiny):
    """A rank whose rank 0 is gone without a word does not wait for the timeout."""
    options = replace(tiny, world_size=2, rendezvous=free_rendezvous())
    rank_0 = start(step_and_die, options)
    worker = Worker(replace(options, rank=1))
    try:
        with pytest.raises(RuntimeError):
            worker.follow()
        rank_0.join()
        assert rank_0.exitcode == 9
    finally:
        worker.close()


def test_a_row_that_is_not_finite_gets_minus_one(tiny):
    """A sequence with broken weights or cache is told so, and its neighbours are not touched."""
    worker = Worker(tiny)
    prompts = random_prompts([5, 9])
    clean = worker.launch(step_plan([Span(prompts[1], 0, [4, 5])], BLOCK_TOKENS), greedy(1)).tokens()
    worker.launch(step_plan([Span(prompts[0], 0, [7])], BLOCK_TOKENS), greedy(1)).tokens()
    worker._runner._layer_caches[0][0, 7, :, 2] = float("nan")
    spans = [Span([1], 5, [7]), Span(prompts[1], 0, [4, 5])]
    assert worker.launch(step_plan(spans, BLOCK_TOKENS), greedy(2)).tokens().tolist() == [-1, clean[0]]


def test_a_step_that_wants_no_logits(tiny):
    """A chunk in the middle of a prompt draws nothing."""
    plan = step_plan([Span([1, 2, 3], 0, [0])], BLOCK_TOKENS)
    plan = replace(plan, logits_rows=plan.logits_rows[:0])
    assert Worker(tiny).launch(plan, greedy(0)).tokens().shape == (0,)


def test_the_pool_is_what_was_asked_or_what_fits(tiny):
    """kv_blocks is taken as it is; else memory is measured, and kv_memory_bytes is its limit."""
    worker = Worker(replace(tiny, kv_blocks=3))
    assert (worker.num_blocks, worker.kv_dtype) == (3, "float32")
    limited = Worker(replace(tiny, kv_blocks=None, kv_memory_bytes=10 * worker.block_bytes + 1))
    assert limited.num_blocks == 10
    default = Worker(replace(tiny, kv_blocks=None))
    assert 0 < default.num_blocks * worker.block_bytes <= 2**30


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"kv_blocks": 2**44}, r"kv_blocks: 17592186044416 blocks .* MiB free .*Lower kv_blocks"),
        ({"kv_blocks": 0}, r"kv_blocks: 1 blocks"),
        ({"kv_blocks": None, "kv_memory_bytes": 10}, r"kv_memory_bytes: 10 .*raise it"),
        ({"world_size": 4, "rendezvous": "127.0.0.1:1"}, r"4 query and 2 KV heads; it splits over 1 or 2"),
        ({"world_size": 2}, r"rendezvous"),
    ],
)
def test_what_cannot_be_is_a_config_error(tiny, changes, message):
    """The error names the key, the numbers, and what to change."""
    with pytest.raises(ConfigError, match=message):
        Worker(replace(tiny, **changes))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int8"])
def test_narrow_dtypes_run_without_the_native_library(tiny, dtype):
    """Blocks of 8 tokens are not for the native library: torch serves, over a cache of two bytes a value."""
    worker = Worker(replace(tiny, dtype=dtype))
    assert worker.kv_dtype == ("float16" if dtype == "float16" else "bfloat16")
    assert worker.block_bytes == BLOCK_TOKENS * tiny.spec.kv_bytes_per_token(2)
    assert len(generate(worker, PROMPTS[:2], 2, BLOCK_TOKENS)[1]) == 2


def test_threads_hold_in_the_thread_that_steps(tiny):
    """OpenMP counts threads for each calling thread; the step thread, too, gets what the options say."""
    worker = Worker(replace(tiny, num_threads=2))
    seen = []

    (openmp_path,) = {
        line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "gomp" in line
    }
    openmp = ctypes.CDLL(openmp_path)  # torch's own count would set OpenMP's by being asked

    def step() -> None:
        worker.launch(step_plan([Span([1, 2], 0, [0])], BLOCK_TOKENS), greedy(1)).tokens()
        seen.append(openmp.omp_get_max_threads())

    thread = threading.Thread(target=step)
    thread.start()
    thread.join()
    torch.set_num_threads(1)
    assert seen == [2]
