"""Whole models on the GPU's kernels: on a GPU where there is one, else in Triton's interpreter."""

import os
from dataclasses import replace

import numpy as np
import pytest
import torch

# Triton reads this where a kernel is defined: before anything imports it.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import transformers

from kernels.dispatch import forced
from serving.engine.executor import ExecutorOptions
from serving.engine.model_runner import ModelRunner, allocate_kv_cache
from serving.engine.rank_dtypes import DTYPES
from serving.engine.worker import Worker
from serving.model_spec import read_model_spec
from serving.models import ARCHITECTURES
from serving.models.layers import Shard
from serving.models.weights import open_weights
from tests.serving.engine.step_plans import Span, generate, step_plan
from tests.serving.models.tiny_llama import VOCAB_SIZE, save_tiny

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BLOCK_TOKENS = 16
SIZES = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 64, "initializer_range": 0.08}
LLAMA, QWEN3, MOE, MISTRAL = (
    transformers.LlamaConfig,
    transformers.Qwen3Config,
    transformers.Qwen3MoeConfig,
    transformers.MistralConfig,
)
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True}
# name → (kind, its config, format of its weights, KV dtype)
VARIANTS = {
    "llama-int8": (LLAMA, {}, "int8", "auto"),
    "llama-int4": (LLAMA, {}, "int4", "auto"),
    "llama-float8": (LLAMA, {}, "float8", "auto"),
    "llama-kv-e4m3": (LLAMA, {}, "plain", "float8_e4m3"),
    "mistral-windowed": (MISTRAL, {"sliding_window": 20}, "plain", "auto"),
    "qwen3": (QWEN3, {"tie_word_embeddings": True}, "plain", "auto"),
    "qwen3-moe": (MOE, EXPERTS, "plain", "auto"),
}
# Nats, where it is not float16's: a value on the edge between two of e4m3 may fall to either side.
MOST_KL = {"llama-float8": 2e-3, "llama-kv-e4m3": 5e-4}


def random_tokens(count: int) -> list[int]:
    return torch.randint(0, VOCAB_SIZE, (count,), generator=torch.Generator().manual_seed(count)).tolist()


def divergence(exact: torch.Tensor, other: torch.Tensor) -> float:
    """Mean KL in nats."""
    exact, other = exact.log_softmax(-1), other.log_softmax(-1)
    return float((exact.exp() * (exact - other)).sum(-1).mean())


def needs_e4m3(variant: str) -> None:
    narrow = variant in ("llama-float8", "llama-kv-e4m3")
    if narrow and DEVICE.type == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no e4m3")


@pytest.mark.parametrize("variant", VARIANTS)
def test_kernels_and_torch_give_the_same_distributions(variant, tmp_path):
    """Two prompts of unlike length, then a step of a chunk behind a context beside a decode: in float16, the
    kernels are as near to torch as roundings allow."""
    needs_e4m3(variant)
    kind, changes, weights, kv_dtype = VARIANTS[variant]
    save_tiny(kind, tmp_path, **SIZES, **changes, num_hidden_layers=1)
    spec = read_model_spec(tmp_path)
    source = open_weights(tuple(tmp_path.glob("*.safetensors")), spec, torch.float16)
    model = ARCHITECTURES[spec.architecture](spec, source, DEVICE, Shard(), weights)
    cache_dtype = DTYPES["float16" if kv_dtype == "auto" else kv_dtype]
    first, second = [3, 1, 6], [0, 5, 2]
    plans = [
        step_plan([Span(random_tokens(30), 0, first), Span(random_tokens(5), 0, second)], BLOCK_TOKENS),
        step_plan([Span(random_tokens(1), 30, first), Span(random_tokens(28), 5, second)], BLOCK_TOKENS),
    ]
    found = []
    for backend in ("torch", "triton"):
        runner = ModelRunner(model, allocate_kv_cache(model, 8, BLOCK_TOKENS, cache_dtype, DEVICE))
        with forced(backend):
            found.append(torch.cat([runner.logits(with_all_rows(plan)) for plan in plans]).cpu())
    expected, ours = found
    assert expected.isfinite().all() and expected.std() > 0.5
    assert divergence(expected, ours) < MOST_KL.get(variant, 2e-5)


def with_all_rows(plan):
    return replace(plan, logits_rows=np.arange(len(plan.token_ids), dtype=np.int32))


@pytest.mark.gpu
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_gpus_graphs_repeat_themselves(variant, tmp_path):
    """Every model and format is captured and replayed: steps that run eagerly, are captured and are replayed
    draw the same tokens, none of them broken."""
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    needs_e4m3(variant)
    kind, changes, weights, kv_dtype = VARIANTS[variant]
    save_tiny(kind, tmp_path, **SIZES, **changes)
    worker = Worker(
        ExecutorOptions(
            weights=tuple(tmp_path.glob("*.safetensors")),
            spec=read_model_spec(tmp_path),
            dtype="bfloat16" if weights == "plain" else weights,
            kv_dtype=kv_dtype,
            device="cuda",
            kv_blocks=64,
            max_num_seqs=4,
        )
    )
    prompts = [random_tokens(count) for count in (5, 17, 40)]
    first, second = (generate(worker, prompts, 12, BLOCK_TOKENS) for _ in range(2))
    assert first == second
    assert all(token >= 0 for tokens in first for token in tokens)
    assert any(graph._graph is not None for graph in worker._runner._graphs.values())
