"""The Qwen3 architecture: Llama's, with a norm of each query and key head before they are rotated
(Yang et al. 2025, Qwen3 technical report, section 2)."""

from __future__ import annotations

import torch

from kernels.linear import WeightFormat
from kernels.rope_kv import QkNorm
from serving.model_spec import ModelSpec
from serving.models.layers import Loader, Shard
from serving.models.llama import Attention, Layer, Llama, layer_of, load_attention, load_mlp
from serving.models.weights import TensorSource


def load_qwen3(
    spec: ModelSpec,
    source: TensorSource,
    device: torch.device,
    shard: Shard,
    weight_format: WeightFormat = "plain",
) -> Llama:
    """One rank's part of a model; raises as `Llama` does."""
    return Llama(spec, source, device, shard, weight_format, _load_layer)


def load_normed_attention(loader: Loader, index: int) -> Attention:
    """Layer `index`'s attention. All heads share the norms' weights [D], so every rank holds them whole."""
    prefix, head_dim = f"model.layers.{index}.self_attn", loader.spec.head_dim
    norm = QkNorm(
        query=loader.whole(f"{prefix}.q_norm.weight", head_dim),
        key=loader.whole(f"{prefix}.k_norm.weight", head_dim),
        eps=loader.spec.rms_norm_eps,
    )
    return load_attention(loader, index, norm)


def _load_layer(loader: Loader, index: int) -> Layer:
    return layer_of(loader, index, load_normed_attention(loader, index), load_mlp(loader, index))
