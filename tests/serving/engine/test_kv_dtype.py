"""A KV cache in e4m3: what it holds, how much it takes, and who agrees on it."""

from dataclasses import replace

import pytest
import torch

import kernels.rope_kv
from kernels.paged_attention import write_kv
from serving.engine.executor import ExecutorOptions
from serving.engine.step_time import KV_DTYPE_BYTES
from serving.engine.worker import Worker
from serving.model_spec import read_model_spec
from tests.serving.engine.step_plans import generate
from tests.serving.models.tiny_llama import VOCAB_SIZE, save_tiny_llama

BLOCK_TOKENS = 16


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> ExecutorOptions:
    """A random Llama whose shapes the native library could run."""
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny_llama(folder, hidden_size=64, intermediate_size=96, head_dim=32)
    return ExecutorOptions(
        weights=tuple(folder.glob("*.safetensors")),
        spec=read_model_spec(folder),
        dtype="float32",
        kv_blocks=64,
    )


def random_prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(0, VOCAB_SIZE, (n,), generator=generator).tolist() for n in (1, 9, 40, 65)]


def write_rounded(cache, key, value, slots):
    """As `write_kv` to a wide cache, of what a narrow one would hold."""
    write_kv(cache, *(x.clamp(-448, 448).to(torch.float8_e4m3fn).to(x.dtype) for x in (key, value)), slots)


def test_attention_sees_keys_and_values_as_they_were_rounded(tiny, monkeypatch):
    """Tokens are those of a float32 cache that is given rounded values, in prefills, chunks and decodes;
    and not those of exact ones."""
    narrow = generate(
        Worker(replace(tiny, kv_dtype="float8_e4m3")), random_prompts(), 20, BLOCK_TOKENS, chunk_tokens=30
    )
    exact = generate(Worker(tiny), random_prompts(), 20, BLOCK_TOKENS, chunk_tokens=30)
    monkeypatch.setattr(kernels.rope_kv, "write_kv", write_rounded)
    rounded = generate(Worker(tiny), random_prompts(), 20, BLOCK_TOKENS, chunk_tokens=30)
    assert narrow == rounded != exact


def test_a_value_takes_a_byte(tiny):
    """A pool of the same memory has four times float32's tokens, and the step-time model knows."""
    limited = replace(tiny, kv_blocks=None, kv_memory_bytes=1 << 20)
    wide, narrow = Worker(limited), Worker(replace(limited, kv_dtype="float8_e4m3"))
    assert (wide.kv_dtype, narrow.kv_dtype) == ("float32", "float8_e4m3")
    assert narrow.block_bytes * 4 == wide.block_bytes == 4 * BLOCK_TOKENS * tiny.spec.kv_bytes_per_token(1)
    assert narrow.num_blocks == 4 * wide.num_blocks
    assert KV_DTYPE_BYTES[narrow.kv_dtype] == 1


def test_on_a_cpu_it_is_torchs(tiny, caplog):
    """The native library's cache is bfloat16: asked for e4m3, torch serves, and says that it is slower."""
    worker = Worker(replace(tiny, dtype="bfloat16", kv_dtype="float8_e4m3"))
    assert worker.kv_dtype == "float8_e4m3"
    assert "kv_dtype float8_e4m3 is not the native library's" in caplog.text
    assert len(generate(worker, random_prompts(), 2, BLOCK_TOKENS)[0]) == 2
