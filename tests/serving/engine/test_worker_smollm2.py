"""The embedded model against transformers, in float32, both reading the same GGUF file."""

import pytest
import torch
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.initialization import no_init_weights
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from serving.engine.executor import ExecutorOptions
from serving.engine.worker import Worker
from serving.model_spec import read_model_spec
from tests.serving.engine.step_plans import generate
from tests.serving.engine.worker_ranks import tensor_parallel

NEW_TOKENS = 24
# Closer than this, float32 rounding decides which of two tokens is the largest.
TIE = 1e-4
PROMPTS = [
    "The capital of France is",
    "Water boils at",
    "def fibonacci(n):\n",
    "Once upon a time, in a village by the sea,",
    "Q: What is 17 + 25?\nA:",
    "The three primary colours are",
    "Dear Sir or Madam,\n\nI am writing to",
    "import numpy as np\n\n# Compute the mean of each row\n",
    "SELECT name, age FROM users WHERE",
    "In 1969, the first humans",
    "The mitochondria is",
    "Roses are red,",
    "A list of European countries:\n1. Germany\n2.",
    "Translate to Spanish: 'Good morning, my friend.'\n",
    "Photosynthesis is the process by which plants",
    "To make a cup of tea, first",
    '{"name": "Ada", "born": 1815, "field":',
    "The opposite of hot is",
    "Once the ship had left the harbour, the captain looked at the chart and",
    "<|im_start|>user\nWhy is the sky blue?<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>system\nYou are a pirate.<|im_end|>\n<|im_start|>user\nHello!<|im_end|>\n"
    "<|im_start|>assistant\n",
    "π is approximately 3.14159, and e is approximately",
    "x",
    " ".join(["The quick brown fox jumps over the lazy dog."] * 12),
]


@pytest.fixture(scope="module")
def options(embedded_model) -> ExecutorOptions:
    return ExecutorOptions(
        weights=embedded_model.weights,
        spec=read_model_spec(embedded_model.folder),
        dtype="float32",
        kv_blocks=512,
    )


@pytest.fixture(scope="module")
def prompts(embedded_model) -> list[list[int]]:
    tokenizer = Tokenizer.from_file(str(embedded_model.folder / "tokenizer.json"))
    return [tokenizer.encode(prompt).ids for prompt in PROMPTS]


@pytest.fixture(scope="module")
def ours(options, prompts) -> list[list[int]]:
    return generate(Worker(options), prompts, NEW_TOKENS, options.block_tokens)


@pytest.fixture(scope="module")
def transformers_model(embedded_model) -> LlamaForCausalLM:
    """transformers' own reading of the file (`from_pretrained(gguf_file=...)` would need accelerate)."""
    with no_init_weights():
        model = LlamaForCausalLM(LlamaConfig.from_pretrained(embedded_model.folder)).eval().float()
    path = str(embedded_model.weights[0])
    tensors = load_gguf_checkpoint(path, return_tensors=True, model_to_load=model)["tensors"]
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])
    model.tie_weights()
    return model


def test_greedy_tokens_equal_transformers(transformers_model, prompts, ours, capsys):
    """Every greedy token is the reference's largest logit, for each prompt up to the reference's first
    near-tie; at least 95 % of all tokens are compared."""
    compared, near_ties = 0, []
    for text, prompt, tokens in zip(PROMPTS, prompts, ours, strict=True):
        with torch.inference_mode():
            logits = transformers_model(torch.tensor([prompt + tokens[:-1]])).logits[0, len(prompt) - 1 :]
        best, chosen = logits.topk(2)
        for at, token in enumerate(tokens):
            if best[at, 0] - best[at, 1] < TIE:
                near_ties.append((text[:30], at))
                break
            assert token == chosen[at, 0], f"{text!r}, new token {at}"
            compared += 1
    with capsys.disabled():
        print(f"\n{compared} greedy tokens equal; near-ties: {near_ties}")
    assert compared >= 0.95 * len(PROMPTS) * NEW_TOKENS


@pytest.mark.full
def test_three_ranks_give_one_ranks_tokens(options, prompts, ours):
    """SmolLM2's 9 query and 3 KV heads split over three ranks, with the same greedy tokens."""
    with tensor_parallel(options, 3) as (worker, _):
        assert generate(worker, prompts, NEW_TOKENS, options.block_tokens) == ours
