"""Our Llama against transformers', in float32, on random weights."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from serving.engine.model_runner import ModelRunner, allocate_kv_cache
from serving.errors import ModelFileError
from serving.model_spec import read_model_spec
from serving.models import ARCHITECTURES
from serving.models.layers import Shard
from serving.models.weights import open_weights
from tests.serving.engine.step_plans import Span, step_plan
from tests.serving.models.tiny_llama import VOCAB_SIZE, save_tiny_llama

BLOCK_TOKENS = 4
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
VARIANTS = {
    "gqa": {},
    "gqa-tied": {"tie_word_embeddings": True},
    "mha": {"num_key_value_heads": 4},
    "mqa-wide-heads": {"num_key_value_heads": 1, "head_dim": 20},
    "llama3-rope": {"rope_parameters": LLAMA3_ROPE},
    "linear-rope": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.5}},
}


def load(folder: Path, dtype: torch.dtype = torch.float32) -> ModelRunner:
    spec = read_model_spec(folder)
    source = open_weights(tuple(sorted(folder.glob("*.safetensors"))), spec, dtype)
    model = ARCHITECTURES[spec.architecture](spec, source, torch.device("cpu"), Shard())
    return ModelRunner(model, allocate_kv_cache(model, 64, BLOCK_TOKENS, dtype, torch.device("cpu")))


def all_logits(runner: ModelRunner, tokens: list[int]) -> torch.Tensor:
    """Logits of every position, from one prefill of `tokens`."""
    plan = step_plan([Span(tokens, 0, list(range(3, 60)))], BLOCK_TOKENS)
    rows = np.arange(len(tokens), dtype=np.int32)
    return runner.logits(replace(plan, logits_rows=rows))


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_transformers(variant, tmp_path):
    """Every position's float32 logits agree within 1e-4 of logits about 10 wide."""
    theirs = save_tiny_llama(tmp_path, **VARIANTS[variant])
    tokens = torch.randint(0, VOCAB_SIZE, (150,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(tokens[None]).logits[0]
    assert expected.std() > 1
    torch.testing.assert_close(all_logits(load(tmp_path), tokens.tolist()), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near(dtype, tmp_path):
    """In 16 bits the distribution stays within 0.02 of KL divergence of float32's, on average."""
    save_tiny_llama(tmp_path)
    tokens = torch.randint(0, VOCAB_SIZE, (60,), generator=torch.Generator().manual_seed(1)).tolist()
    exact = all_logits(load(tmp_path), tokens).log_softmax(-1)
    rounded = all_logits(load(tmp_path, dtype), tokens).log_softmax(-1)
    assert (exact.exp() * (exact - rounded)).sum(-1).mean() < 0.02


def test_sharded_files_are_one_model(tmp_path):
    """A checkpoint in several safetensors files loads as the same model as in one."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    save_tiny_llama(whole)
    save_tiny_llama(parts, shard_size="50KB")
    assert len(list(parts.glob("*.safetensors"))) > 1
    tokens = list(range(20))
    assert all_logits(load(parts), tokens).equal(all_logits(load(whole), tokens))


def test_biases_are_refused(tmp_path):
    """A Llama with attention biases would answer wrongly, so it does not load."""
    save_tiny_llama(tmp_path, attention_bias=True)
    with pytest.raises(ModelFileError, match=r"self_attn\.\w+\.bias.*not supported"):
        load(tmp_path)
