"""The Qwen3-MoE architecture: Qwen3 with a mixture of experts in each MLP's place (`kernels.moe`).

A rank holds its part of every expert's width, and the whole router: each rank routes all tokens alike,
and the experts' partial sums are added as a dense MLP's are.

E experts, f this rank's part of an expert's width, d hidden size
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from kernels.linear import PackedWeight, WeightFormat, linear, pack_weight
from kernels.moe import ExpertWeights, expert_mlp, route
from serving.model_spec import Experts, ModelSpec
from serving.models.layers import Loader, Shard
from serving.models.llama import Layer, Llama, layer_of
from serving.models.qwen3 import load_normed_attention
from serving.models.weights import TensorSource


@dataclass(frozen=True)
class ExpertMlp:
    """One layer's experts on this rank."""

    router: PackedWeight  # [E, d]
    experts: ExpertWeights
    routing: Experts
    shard: Shard

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        logits = linear(x, self.router)
        shares, chosen = route(logits, self.routing.per_token, renormalize=self.routing.renormalize)
        out = expert_mlp(x, self.experts, shares, chosen)
        self.shard.all_reduce(out)
        return out

    def weights(self) -> Iterator[PackedWeight]:
        yield self.router
        for tensor in (self.experts.gate_up, self.experts.down):
            yield PackedWeight(tensor, tensor.nbytes, tensor.numel())


def load_qwen3_moe(
    spec: ModelSpec,
    source: TensorSource,
    device: torch.device,
    shard: Shard,
    weight_format: WeightFormat = "plain",
) -> Llama:
    """One rank's part of a model; raises as `Llama` does. No narrow format has room for experts."""
    assert weight_format == "plain", "the worker has checked"
    return Llama(spec, source, device, shard, weight_format, _load_layer)


def _load_layer(loader: Loader, index: int) -> Layer:
    return layer_of(loader, index, load_normed_attention(loader, index), _load_experts(loader, index))


def _load_experts(loader: Loader, index: int) -> ExpertMlp:
    routing, d, prefix = loader.spec.experts, loader.spec.hidden_size, f"model.layers.{index}.mlp"
    assert routing is not None
    width, part = routing.intermediate_size, routing.intermediate_size // loader.shard.world_size
    dtype, device = loader.source.dtype, loader.device
    gate_up = torch.empty(routing.count, 2 * part, d, dtype=dtype, device=device)
    down = torch.empty(routing.count, d, part, dtype=dtype, device=device)
    for number in range(routing.count):  # one at a time: a layer is never in memory twice
        expert = f"{prefix}.experts.{number}"
        names = (f"{expert}.gate_proj.weight", f"{expert}.up_proj.weight")
        gate_up[number] = loader.stacked(names, (width, width), d)
        down[number] = loader.some_columns(f"{expert}.down_proj.weight", d, width)
    router = pack_weight(loader.whole(f"{prefix}.gate.weight", routing.count, d))
    return ExpertMlp(router, ExpertWeights(gate_up, down), routing, loader.shard)
