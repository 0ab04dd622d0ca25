"""The native forward pass against the torch one, on random models of odd shapes."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from kernels.cpu.packing import quantize_groups
from kernels.linear import linear
from serving.engine.model_runner import ModelRunner, allocate_kv_cache
from serving.engine.native_runner import NativeRunner
from serving.engine.plan import StepPlan
from serving.model_spec import ModelSpec, read_model_spec
from serving.models import ARCHITECTURES, layers, llama
from serving.models.layers import Shard
from serving.models.native_llama import NativeLlama, unsupported
from serving.models.weights import open_weights
from tests.kernels.native_cases import built, needs_library, rounded
from tests.serving.engine.step_plans import Span, step_plan
from tests.serving.models.tiny_llama import VOCAB_SIZE, save_tiny_llama

NUM_BLOCKS = 80
BASE = dict(hidden_size=96, intermediate_size=160, num_attention_heads=4, num_key_value_heads=2, head_dim=32)
VARIANTS = {
    "gqa": {},
    "tied": {"tie_word_embeddings": True},
    "mha": {"num_key_value_heads": 4},
    "mqa-of-64": {"num_key_value_heads": 1, "head_dim": 64},
    "three-to-one-of-128": {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 128},
    "heads-of-256": {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 256},
}

pytestmark = needs_library


@dataclass(frozen=True)
class Pair:
    """The same model in several ways."""

    spec: ModelSpec
    exact: ModelRunner  # float32
    narrow: ModelRunner  # the same with a bfloat16 KV cache: the torch path of int8
    native: NativeRunner
    native_cache: torch.Tensor


def load(folder, precision: str, block_tokens: int = 16) -> Pair:
    """int8 is given weights that have an 8-bit form: what differs is the arithmetic, not the model."""
    if precision == "int8":
        (path,) = folder.glob("*.safetensors")
        weights = load_file(path)
        matrices = {name: quantize_groups(w).dequantize() for name, w in weights.items() if w.dim() == 2}
        save_file(weights | matrices, path)
    spec = read_model_spec(folder)
    files = tuple(folder.glob("*.safetensors"))
    cpu = torch.device("cpu")
    model = ARCHITECTURES[spec.architecture](spec, open_weights(files, spec, torch.float32), cpu, Shard())
    exact, narrow = (
        ModelRunner(model, allocate_kv_cache(model, NUM_BLOCKS, block_tokens, dtype, cpu))
        for dtype in (torch.float32, torch.bfloat16)
    )
    native = NativeLlama(spec, open_weights(files, spec, torch.bfloat16), Shard(), precision, built())
    cache = allocate_kv_cache(native, NUM_BLOCKS, block_tokens, torch.bfloat16, cpu)
    cache.fill_(float("nan"))  # whoever reads a slot that nobody wrote gets to feel it
    native.attach(cache, 2)
    return Pair(spec, exact, narrow, NativeRunner(native), cache)


def all_rows(plan: StepPlan) -> StepPlan:
    rows = np.arange(len(plan.token_ids), dtype=np.int32)
    return replace(plan, logits_rows=rows)


def random_tokens(count: int, seed: int = 1) -> list[int]:
    return torch.randint(0, VOCAB_SIZE, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def tables(num_tokens: list[int], block_tokens: int) -> list[list[int]]:
    """Scattered blocks for sequences of these lengths."""
    free = iter(np.random.default_rng(0).permutation(NUM_BLOCKS).tolist())
    return [[next(free) for _ in range(-(-n // block_tokens))] for n in num_tokens]


def divergence(exact: torch.Tensor, other: torch.Tensor) -> float:
    exact, other = exact.log_softmax(-1), other.log_softmax(-1)
    return float((exact.exp() * (exact - other)).sum(-1).mean())


def mixed_steps() -> list[StepPlan]:
    """Whole prompts, then chunks behind a context beside decodes; every row's logits are wanted."""
    texts = [random_tokens(n, n) for n in (1, 16, 17, 64, 65, 130)]
    places = tables([len(text) + 40 for text in texts], 16)
    first = [Span(text, 0, place) for text, place in zip(texts, places, strict=True)]
    counts = (1, 1, 20, 1, 33, 1)
    second = [
        Span(random_tokens(count), len(text), place)
        for count, text, place in zip(counts, texts, places, strict=True)
    ]
    return [all_rows(step_plan(spans, 16)) for spans in (first, second)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_bfloat16_stays_near_the_float32_model(variant, tmp_path):
    """Every position of mixed steps: KL divergence below 0.02 on average."""
    save_tiny_llama(tmp_path, **(BASE | VARIANTS[variant]))
    pair = load(tmp_path, "bfloat16")
    for plan in mixed_steps():
        assert divergence(pair.exact.logits(plan), pair.native.logits(plan)) < 0.02


@pytest.mark.parametrize("variant", VARIANTS)
def test_int8_errs_as_its_rounding_does(variant, tmp_path, monkeypatch):
    """It diverges as a float32 model with inputs rounded to 8 bits does, attention in bfloat16 besides."""
    save_tiny_llama(tmp_path, **(BASE | VARIANTS[variant]))
    pair = load(tmp_path, "int8")
    for plan in mixed_steps():
        exact, ours = pair.exact.logits(plan), pair.native.logits(plan)
        with monkeypatch.context() as patch:
            for module in (layers, llama):
                patch.setattr(module, "linear", lambda x, w: linear(rounded(x, "int8"), w))
            emulated = pair.narrow.logits(plan)
        assert divergence(exact, ours) < 3 * divergence(exact, emulated) + 1e-3


@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
@pytest.mark.parametrize("block_tokens", [16, 32])
def test_a_row_does_not_depend_on_its_batch_or_its_chunks(precision, block_tokens, tmp_path):
    """Bit for bit: alone and whole, or in chunks beside others, in any blocks."""
    save_tiny_llama(tmp_path, **BASE)
    pair = load(tmp_path, precision, block_tokens)
    text = random_tokens(150)
    place, *others = tables([150, *[40] * 9], block_tokens)
    alone = pair.native.logits(all_rows(step_plan([Span(text, 0, place)], block_tokens)))
    pair.native_cache.fill_(float("nan"))
    pieces = []
    for start, end in [(0, 1), (1, 63), (63, 64), (64, 100), (100, 150)]:
        beside = [Span(random_tokens(n + 1, n), 0, other) for n, other in enumerate(others)]
        spans = [*beside[:4], Span(text[start:end], start, place[::1]), *beside[4:]]
        begin = sum(len(span.tokens) for span in beside[:4])
        plan = all_rows(step_plan(spans, block_tokens))
        pieces.append(pair.native.logits(plan)[begin : begin + end - start])
    assert torch.cat(pieces).equal(alone)


def test_a_token_beyond_the_vocabulary_is_refused(tmp_path):
    """As torch does it; unchecked, the row after the last would be read."""
    save_tiny_llama(tmp_path, **BASE, tie_word_embeddings=True)
    pair = load(tmp_path, "bfloat16")
    for token in (-1, VOCAB_SIZE):
        with pytest.raises(IndexError, match=str(VOCAB_SIZE)):
            pair.native.logits(step_plan([Span([1, token], 0, [0])], 16))


@pytest.mark.parametrize("part", [slice(0, 1), slice(1, 2), slice(0, 2)], ids=["keys", "values", "both"])
def test_a_broken_sequence_breaks_no_other(part, tmp_path):
    """NaN keys or values of one sequence reach its own logits, and those only."""
    save_tiny_llama(tmp_path, **BASE)
    pair = load(tmp_path, "int8")
    broken, sound = tables([40, 40], 16)
    texts = random_tokens(30), random_tokens(30, 2)
    spans = [Span(text, 0, place) for text, place in zip(texts, (broken, sound), strict=True)]
    pair.native.logits(step_plan(spans, 16))
    after = [Span([5], 30, broken), Span([7], 30, sound)]
    expected = pair.native.logits(step_plan(after, 16))[1]
    pair.native_cache[:, part, broken] = float("nan")
    logits = pair.native.logits(step_plan(after, 16))
    assert not logits[0].isfinite().any()
    assert logits[1].equal(expected)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"head_dim": 40}, "head dim 40"),
        ({"hidden_size": 100}, "multiples of 32"),
        ({"intermediate_size": 72}, "multiples of 32"),
        ({"num_attention_heads": 96, "num_key_value_heads": 1}, "96 query heads share"),
    ],
)
def test_shapes_it_cannot_run_are_named(changes, why, tmp_path):
    """The torch path serves those; the reason is for the log."""
    save_tiny_llama(tmp_path, **(BASE | changes))
    assert why in unsupported(read_model_spec(tmp_path), 1, 16)


def test_block_tokens_it_cannot_run_are_named(tmp_path):
    """Keys are read sixteen at a time."""
    save_tiny_llama(tmp_path, **BASE)
    spec = read_model_spec(tmp_path)
    assert "block_tokens 8" in unsupported(spec, 1, 8)
    assert unsupported(spec, 1, 32) is None
    assert "multiples of 32" in unsupported(spec, 2, 16), "80 columns a rank"
