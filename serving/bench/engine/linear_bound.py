"""What a decode step's matrices alone take: all layers' products and the head's, nothing between them."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from kernels.linear import PackedWeight, linear, pack_weight
from serving.bench.engine.offline import EngineUnderTest
from serving.engine.native_runner import NativeRunner
from serving.model_spec import ModelSpec

_TRIES = 5

Products = Callable[[int], object]


def products_of(under_test: EngineUnderTest) -> Products:
    """Runs the matrix products of a step of so many tokens, on the kernels that the engine's steps use."""
    runner = under_test.runner
    if isinstance(runner, NativeRunner):
        return runner.run_linears
    return TorchProducts(under_test.spec, getattr(torch, under_test.dtype))


def step_s(products: Products, batch: int) -> float:
    """Seconds they take at this batch; the median of a few times."""
    products(batch)
    times_s = []
    for _ in range(_TRIES):
        started_s = time.perf_counter()
        products(batch)
        times_s.append(time.perf_counter() - started_s)
    return sorted(times_s)[_TRIES // 2]


class TorchProducts:
    """A model's matrices of random weights, packed as on the torch path, each in memory of its own."""

    def __init__(self, spec: ModelSpec, dtype: torch.dtype) -> None:
        self._dtype = dtype
        queries, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        d, f = spec.hidden_size, spec.intermediate_size
        layer = [(queries + 2 * kv, d), (d, queries), (2 * f, d), (d, f)]
        self._shapes = [*layer * spec.num_layers, (spec.vocab_size, d)]
        self._weights = [self._random(shape) for shape in self._shapes]

    @torch.inference_mode()
    def __call__(self, num_tokens: int) -> None:
        inputs = {width: torch.ones(num_tokens, width, dtype=self._dtype) for _, width in self._shapes}
        for weight, (_, width) in zip(self._weights, self._shapes, strict=True):
            linear(inputs[width], weight)

    def _random(self, shape: tuple[int, int]) -> PackedWeight:
        return pack_weight((torch.randn(shape) / shape[1] ** 0.5).to(self._dtype))
