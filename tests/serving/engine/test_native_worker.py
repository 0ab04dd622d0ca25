"""The worker on the native library: split over ranks, and exchanged for the torch path while it serves."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import MistralConfig

from kernels.cpu import library
from serving.engine.executor import ExecutorOptions
from serving.engine.model_runner import ModelRunner
from serving.engine.native_runner import NativeRunner
from serving.engine.worker import Worker
from serving.model_spec import read_model_spec
from tests.kernels.native_cases import built, needs_library
from tests.serving.engine.step_plans import Span, generate, greedy, step_plan
from tests.serving.engine.worker_ranks import tensor_parallel
from tests.serving.models.tiny_llama import VOCAB_SIZE, save_tiny, save_tiny_llama

pytestmark = needs_library

PROMPT = list(range(2, 60))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> ExecutorOptions:
    """Widths that the library can run, whole and halved."""
    built()
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny_llama(folder, hidden_size=96, intermediate_size=192, head_dim=32)
    return options_of(folder)


def options_of(folder: Path) -> ExecutorOptions:
    return ExecutorOptions(
        weights=tuple(folder.glob("*.safetensors")),
        spec=read_model_spec(folder),
        dtype="bfloat16",
        kv_blocks=100,
        num_threads=2,
    )


def logits(worker: Worker, tokens: list[int]) -> torch.Tensor:
    plan = step_plan([Span(tokens, 0, list(range(5)))], 16)
    return worker._runner.logits(plan)


def divergence(one: torch.Tensor, other: torch.Tensor) -> float:
    one, other = one.log_softmax(-1), other.log_softmax(-1)
    return float((one.exp() * (one - other)).sum(-1).mean())


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_two_ranks_are_one_model(tiny, dtype):
    """Split over two ranks, which sum half-layers in float32, the next token's distribution is the same."""
    options = replace(tiny, dtype=dtype)
    plan = step_plan([Span(PROMPT, 0, list(range(5)))], 16)
    whole = Worker(options)
    assert isinstance(whole._runner, NativeRunner)
    expected = logits(whole, PROMPT)
    with tensor_parallel(options, 2) as (worker, _):
        assert isinstance(worker._runner, NativeRunner)
        tokens = worker.launch(plan, greedy(1)).tokens()
        worker._send(1, plan.pack())  # the other rank takes part in what is asked of the runner here
        found = worker._runner.logits(plan)
    assert found.argmax() == tokens[0]
    # Rounding of a sum in another order, seen through 8 bits.
    assert divergence(expected, found) < (1e-3 if dtype == "bfloat16" else 2e-2)


@pytest.mark.parametrize("window", [None, 16])
def test_a_mistral_without_a_window_is_a_llama_to_the_library(tmp_path, window):
    """It gives the float32 model's distribution; one with a window runs on torch's kernels."""
    built()
    sizes = dict(hidden_size=96, intermediate_size=192, head_dim=32, sliding_window=window)
    save_tiny(MistralConfig, tmp_path, **sizes)
    worker = Worker(options_of(tmp_path))
    assert isinstance(worker._runner, NativeRunner) is (window is None)
    exact = Worker(replace(options_of(tmp_path), dtype="float32"))
    assert divergence(logits(exact, PROMPT), logits(worker, PROMPT)) < 5e-3


def test_an_engine_without_the_library_is_given_it_while_it_serves(tiny, monkeypatch):
    """Torch serves until the library is there; then steps go on over the keys and values of before."""
    expected = generate(Worker(replace(tiny, dtype="float32")), [PROMPT], 1, 16)
    with monkeypatch.context() as patch:
        patch.setattr(library, "cached", lambda: None)
        worker = Worker(tiny)
    assert isinstance(worker._runner, ModelRunner)
    first = step_plan([Span(PROMPT, 0, list(range(5)))], 16)
    assert worker._upgrade is not None
    worker._upgrade._thread.join(60)
    token = worker.launch(first, greedy(1)).tokens()
    assert isinstance(worker._runner, NativeRunner) and worker._upgrade is None
    assert token.tolist() == expected[0]
    again = step_plan([Span(token.tolist(), len(PROMPT), list(range(5)))], 16)
    whole = step_plan([Span(PROMPT + token.tolist(), 0, list(range(5, 10)))], 16)
    tokens, expected = (worker.launch(plan, greedy(1)).tokens().tolist() for plan in (again, whole))
    assert tokens == expected


def test_keys_and_values_of_the_torch_path_are_read_by_the_library(tiny, monkeypatch):
    """A context that torch has computed continues natively as if it had been native all along."""
    with monkeypatch.context() as patch:
        patch.setattr(library, "cached", lambda: None)
        worker = Worker(tiny)
    upgrade, worker._upgrade = worker._upgrade, None
    worker.launch(step_plan([Span(PROMPT, 0, list(range(5)))], 16), greedy(1)).tokens()
    upgrade._thread.join(60)
    native = upgrade.take()
    following = step_plan([Span([7], len(PROMPT), list(range(5)))], 16)
    torch_then_native = native.logits(following)
    assert divergence(logits(Worker(tiny), [*PROMPT, 7]), torch_then_native) < 0.02


def test_a_build_that_fails_leaves_torch_in_place(tiny, monkeypatch, caplog):
    """The reason is logged, and the engine serves on."""

    def fail() -> None:
        raise RuntimeError("g++ is on holiday")

    monkeypatch.setattr(library, "cached", lambda: None)
    monkeypatch.setattr(library, "build", fail)
    worker = Worker(tiny)
    worker._upgrade._thread.join(60)
    tokens = worker.launch(step_plan([Span(PROMPT, 0, list(range(5)))], 16), greedy(1)).tokens()
    assert isinstance(worker._runner, ModelRunner) and 0 <= tokens[0] < VOCAB_SIZE
    assert "on holiday" in caplog.text


def test_steps_without_logits_run_too(tiny):
    """A prefill chunk that is not the last wants nothing drawn."""
    worker = Worker(tiny)
    plan = step_plan([Span(PROMPT, 0, list(range(5)))], 16)
    plan = replace(plan, logits_rows=np.empty(0, dtype=np.int32))
    assert len(worker.launch(plan, greedy(0)).tokens()) == 0
