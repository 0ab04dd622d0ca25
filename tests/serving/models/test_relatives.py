"""Llama's relatives against transformers', in float32, on random weights: windows, head norms, experts."""

import json
from dataclasses import replace

import gguf
import pytest
import torch
from safetensors.torch import load_file
from transformers import MistralConfig, PreTrainedConfig, Qwen3Config, Qwen3MoeConfig

from serving.engine.executor import ExecutorOptions
from serving.engine.worker import Worker
from serving.errors import ModelFileError
from serving.model_spec import read_model_spec
from tests.serving.engine.step_plans import Span, generate, step_plan
from tests.serving.engine.worker_ranks import tensor_parallel
from tests.serving.models.tiny_llama import VOCAB_SIZE, save_tiny

BLOCK_TOKENS = 4
NEW_TOKENS = 24
WINDOWED = {"use_sliding_window": True, "sliding_window": 9}
VARIANTS: dict[str, tuple[type[PreTrainedConfig], dict[str, object]]] = {
    "mistral": (MistralConfig, {"sliding_window": None}),
    "mistral-windowed": (MistralConfig, {"sliding_window": 9}),
    "qwen3": (Qwen3Config, {}),
    "qwen3-tied-wide-heads": (Qwen3Config, {"tie_word_embeddings": True, "head_dim": 20}),
    "qwen3-windowed-from-layer-1": (Qwen3Config, {**WINDOWED, "max_window_layers": 1}),
    "qwen3-window-by-layer": (
        Qwen3Config,
        {**WINDOWED, "layer_types": ["sliding_attention", "full_attention"]},
    ),
}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
VARIANTS |= {
    "qwen3-moe": (Qwen3MoeConfig, {**EXPERTS, "norm_topk_prob": True}),
    "qwen3-moe-shares-as-they-are": (Qwen3MoeConfig, EXPERTS),
}


def random_tokens(count: int) -> list[int]:
    return torch.randint(0, VOCAB_SIZE, (count,), generator=torch.Generator().manual_seed(count)).tolist()


PROMPTS = [random_tokens(count) for count in (1, 3, 8, 30, 61)]


def options_of(folder) -> ExecutorOptions:
    return ExecutorOptions(
        weights=tuple(sorted(folder.glob("*.safetensors"))),
        spec=read_model_spec(folder),
        dtype="float32",
        block_tokens=BLOCK_TOKENS,
        kv_blocks=200,
    )


@pytest.fixture(scope="module", params=VARIANTS)
def both(request, tmp_path_factory):
    """Theirs, and the options of ours."""
    kind, changes = VARIANTS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    theirs = save_tiny(kind, folder, **changes)
    return theirs, options_of(folder)


def test_logits_equal_transformers(both):
    """Every position's float32 logits agree within 1e-4 of logits more than 1 wide."""
    theirs, options = both
    tokens = random_tokens(150)
    with torch.inference_mode():
        expected = theirs(torch.tensor([tokens])).logits[0]
    assert expected.std() > 1
    plan = step_plan([Span(tokens, 0, list(range(3, 60)))], BLOCK_TOKENS)
    rows = torch.arange(len(tokens), dtype=torch.int32).numpy()
    ours = Worker(options)._runner.logits(replace(plan, logits_rows=rows))
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("chunk_tokens", [7, 10**6])
def test_greedy_tokens_equal_transformers(both, chunk_tokens):
    """Batched with others, in chunks and one by one, each token is the one that transformers would choose
    after the same text."""
    theirs, options = both
    for prompt, tokens in zip(
        PROMPTS, generate(Worker(options), PROMPTS, NEW_TOKENS, BLOCK_TOKENS, chunk_tokens), strict=True
    ):
        with torch.inference_mode():
            logits = theirs(torch.tensor([prompt + tokens[:-1]])).logits[0, len(prompt) - 1 :]
        assert tokens == logits.argmax(-1).tolist()


@pytest.mark.parametrize("tied", [True, False])
def test_a_qwen3_gguf_is_the_same_model(tied, tmp_path):
    """Tensors under llama.cpp's names, in its order, give the logits of the safetensors file."""
    save_tiny(Qwen3Config, tmp_path, tie_word_embeddings=tied)
    options = options_of(tmp_path)
    (path,) = options.weights
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, 2)
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "qwen3")
    for name, weight in load_file(path).items():
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    plan = step_plan([Span(random_tokens(40), 0, list(range(10)))], BLOCK_TOKENS)
    expected = Worker(options)._runner.logits(plan)
    ours = Worker(replace(options, weights=(tmp_path / "model.gguf",)))._runner.logits(plan)
    assert ours.equal(expected)


@pytest.mark.parametrize("variant", ["mistral-windowed", "qwen3", "qwen3-moe"])
def test_two_ranks_give_one_ranks_tokens(variant, tmp_path):
    """Split over two ranks, whose norms of heads are whole and whose experts are each cut in two."""
    kind, changes = VARIANTS[variant]
    save_tiny(kind, tmp_path, **changes)
    options = options_of(tmp_path)
    expected = generate(Worker(options), PROMPTS, NEW_TOKENS, BLOCK_TOKENS)
    with tensor_parallel(options, 2) as (worker, _):
        assert generate(worker, PROMPTS, NEW_TOKENS, BLOCK_TOKENS) == expected


@pytest.mark.parametrize("variant", ["qwen3", "mistral-windowed"])
def test_relatives_run_on_torch_on_a_cpu(variant, tmp_path, caplog):
    """The native library is for Llama alone: what else asks for a dtype of its gets torch, and is told."""
    kind, changes = VARIANTS[variant]
    save_tiny(kind, tmp_path, hidden_size=64, intermediate_size=96, **(changes | {"head_dim": 32}))
    options = replace(options_of(tmp_path), dtype="bfloat16", block_tokens=16)
    assert len(generate(Worker(options), PROMPTS, 2, 16)[0]) == 2
    assert "bfloat16 runs on torch's kernels, several times slower" in caplog.text


@pytest.mark.parametrize(
    ("variant", "changes", "said"),
    [
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types: .*window of None"),
        ("qwen3", {"layer_types": ["full_attention", "chunked_attention"]}, "layer_types"),
        ("qwen3", {"layer_types": ["full_attention"]}, "layer_types"),
        ("qwen3", {"head_dim": None}, "head_dim"),
        ("qwen3-moe", WINDOWED, "use_sliding_window"),
        ("qwen3-moe", {"mlp_only_layers": [1]}, "mlp_only_layers"),
        ("qwen3-moe", {"decoder_sparse_step": 2}, "decoder_sparse_step"),
        ("mistral-windowed", {"layer_types": ["full_attention"] * 2}, "layer_types"),
    ],
)
def test_what_would_be_computed_otherwise_is_refused(variant, changes, said, tmp_path):
    """A key that transformers heeds and we do not is an error that names it."""
    kind, settings = VARIANTS[variant]
    config = kind(
        **settings, num_hidden_layers=2, architectures=[f"{kind.__name__[:-6]}ForCausalLM"]
    ).to_dict()
    config |= changes
    if changes.get("head_dim", 0) is None:
        del config["head_dim"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelFileError, match=f"config.json.*{said}"):
        read_model_spec(tmp_path)


def test_a_mistral_config_that_does_not_say_has_a_window(tmp_path):
    """As transformers takes it; null is none."""
    config = MistralConfig(num_hidden_layers=2, architectures=["MistralForCausalLM"]).to_dict()
    for given, windows in (({}, (4096, 4096)), ({"sliding_window": None}, ())):
        config.pop("sliding_window", None)
        (tmp_path / "config.json").write_text(json.dumps(config | given))
        assert read_model_spec(tmp_path).windows == windows
