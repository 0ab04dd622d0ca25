"""Layers whose weights are kept in fewer bits, through the kernels' torch paths."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file

from kernels.linear import pack_weight
from kernels.quantized_linear import (
    dequantize_fp8,
    dequantize_int4,
    dequantize_int8,
    quantize_fp8,
    quantize_int4,
    quantize_int8,
)
from kernels.row_quantization import quantize_rows
from serving.engine import rank_dtypes
from serving.engine.executor import ExecutorOptions
from serving.engine.model_runner import ModelRunner, allocate_kv_cache
from serving.engine.rank_dtypes import check_dtypes, weight_format, widening_bytes
from serving.engine.worker import Worker
from serving.errors import ConfigError
from serving.model_spec import read_model_spec
from serving.models import ARCHITECTURES, layers
from serving.models.layers import Shard
from serving.models.weights import open_weights
from tests.serving.engine.step_plans import Span, step_plan
from tests.serving.models.tiny_llama import VOCAB_SIZE, save_tiny

CPU = torch.device("cpu")
SIZES = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
ROUND = {
    "int8": lambda weight: dequantize_int8(quantize_int8(weight), weight.dtype),
    "int4": lambda weight: dequantize_int4(quantize_int4(weight), weight.dtype),
    "float8": lambda weight: dequantize_fp8(quantize_fp8(weight), weight.dtype),
}
BYTES = {"int8": 1.0, "int4": 0.5, "float8": 1.0}
KINDS = {"llama": transformers.LlamaConfig, "qwen3": transformers.Qwen3Config}


def load(folder, kind: str = "plain") -> ModelRunner:
    spec = read_model_spec(folder)
    source = open_weights(tuple(folder.glob("*.safetensors")), spec, torch.float32)
    model = ARCHITECTURES[spec.architecture](spec, source, CPU, Shard(), kind)
    return ModelRunner(model, allocate_kv_cache(model, 16, 16, torch.float32, CPU))


def all_logits(runner: ModelRunner) -> torch.Tensor:
    """Of a prefill, then of a token after it."""
    tokens = torch.randint(0, VOCAB_SIZE, (70,), generator=torch.Generator().manual_seed(2)).tolist()
    blocks = [3, 9, 1, 0, 7]
    plan = step_plan([Span(tokens[:69], 0, blocks)], 16)
    prefill = runner.logits(replace(plan, logits_rows=np.arange(69, dtype=np.int32)))
    return torch.cat((prefill, runner.logits(step_plan([Span(tokens[69:], 69, blocks)], 16))))


def linear_of_rounded(x, weight):
    """A plain product of activations that are rounded as an FP8 layer's."""
    rows, scale = quantize_rows(x, torch.float8_e4m3fn)
    return F.linear(rows.float() * scale[:, None], weight.data.to_dense())


@pytest.mark.parametrize("architecture", KINDS)
@pytest.mark.parametrize("kind", ROUND)
def test_a_quantised_model_is_the_model_of_its_rounded_weights(kind, architecture, tmp_path, monkeypatch):
    """Fused or cut, every layer's matrix is its rounding, row by row; embeddings, head and norms are
    exact. What a step reads of a weight is as many bytes as the format has."""
    save_tiny(KINDS[architecture], tmp_path, **SIZES)
    quantised = load(tmp_path, kind)
    ours, exact = all_logits(quantised), all_logits(load(tmp_path))
    (path,) = tmp_path.glob("*.safetensors")
    weights = load_file(path)
    projections = {name: weight for name, weight in weights.items() if "_proj" in name}
    save_file(weights | {name: ROUND[kind](weight) for name, weight in projections.items()}, path)
    if kind == "float8":
        monkeypatch.setattr(layers, "linear", linear_of_rounded)
    torch.testing.assert_close(ours, all_logits(load(tmp_path)), rtol=1e-4, atol=1e-4)
    assert (ours - exact).abs().max() > 1e-2
    values = sum(weight.numel() for weight in projections.values())
    head = weights["lm_head.weight"].numel()
    least = (BYTES[kind] * values + 4 * head) / (values + head)
    assert least < quantised.bytes_per_weight < 1.2 * least


def test_int4_says_which_inputs_it_takes():
    """The format's groups are 128 inputs."""
    with pytest.raises(ValueError, match="multiples of 128"):
        pack_weight(torch.zeros(4, 96), "int4")


@pytest.fixture
def options(tmp_path) -> ExecutorOptions:
    save_tiny(transformers.LlamaConfig, tmp_path, **SIZES)
    return ExecutorOptions(
        weights=tuple(tmp_path.glob("*.safetensors")), spec=read_model_spec(tmp_path), kv_blocks=4
    )


@pytest.mark.parametrize("dtype", ["int4", "float8"])
def test_formats_of_a_gpu_are_refused_on_a_cpu(options, dtype):
    """A worker, like the config, says what to take instead."""
    with pytest.raises(ConfigError, match=f"model.dtype: {dtype} needs engine.device cuda; a CPU has int8"):
        Worker(replace(options, dtype=dtype))


def test_int8_on_a_cpu_keeps_its_own_kernels(options):
    """Where the native library is not used, float32 is multiplied with, as before."""
    assert weight_format(replace(options, dtype="int8")) == "plain"
    assert Worker(replace(options, dtype="int8", block_tokens=8)).bytes_per_weight == 4


def on_gpu(options: ExecutorOptions, monkeypatch, capability: tuple[int, int], **changes) -> ExecutorOptions:
    monkeypatch.setattr(rank_dtypes.torch.cuda, "get_device_capability", lambda device: capability)
    return replace(options, device="cuda", **changes)


def test_a_gpu_holds_the_format_and_computes_in_16_bits(options, monkeypatch):
    """Each narrow dtype has a bfloat16 cache; wide steps need room for one widened matrix, but in FP8."""
    for dtype, room in (("int8", 8), ("int4", 12), ("float8", 0)):
        asked = on_gpu(options, monkeypatch, (9, 0), dtype=dtype)
        check_dtypes(asked)
        assert (weight_format(asked), asked.kv_cache_dtype) == (dtype, "bfloat16")
        assert widening_bytes(asked) == room * 2 * 256 * 128
    assert widening_bytes(replace(options, device="cuda", dtype="bfloat16")) == 0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"dtype": "float8"}, r"model.dtype: float8 needs .* 8.9 or more; this one has 8.0"),
        ({"kv_dtype": "float8_e4m3", "dtype": "bfloat16"}, r"engine.kv_dtype: float8_e4m3 needs"),
        ({"dtype": "int4", "world_size": 2}, r"int4 needs inputs in multiples of 128; .* 128, 64, 128"),
        ({"dtype": "float8", "world_size": 16}, r"float8 needs inputs in multiples of 16"),
    ],
)
def test_what_a_gpu_or_a_split_does_not_have_is_refused(options, monkeypatch, changes, said):
    """By the key's name, with the numbers."""
    with pytest.raises(ConfigError, match=said):
        check_dtypes(on_gpu(options, monkeypatch, (8, 0), **changes))


def test_experts_are_not_quantised(tmp_path, monkeypatch):
    """There is no kernel for it, so it is said at the start."""
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
    save_tiny(transformers.Qwen3MoeConfig, tmp_path, **SIZES, **experts)
    options = ExecutorOptions(weights=(), spec=read_model_spec(tmp_path), dtype="int8")
    with pytest.raises(ConfigError, match=r"int8 is not for experts"):
        check_dtypes(on_gpu(options, monkeypatch, (9, 0)))
