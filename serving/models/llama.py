"""The Llama architecture: RMSNorm, rotary grouped-query attention, SwiGLU (Touvron et al. 2023).

T tokens of the step, d hidden size, H query heads and K key/value heads of this rank, D head dim,
f this rank's MLP width, V vocabulary, S rows whose logits are wanted
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from kernels.linear import PackedWeight, linear, pack_weight
from kernels.paged_attention import AttentionBatch, paged_attention
from kernels.rms_norm import add_rms_norm, rms_norm
from kernels.rope import rope_frequencies, rope_table, scale_linear, scale_llama3
from kernels.rope_kv import rope_and_write_kv
from kernels.swiglu import swiglu
from serving.errors import ModelFileError
from serving.model_spec import ModelSpec
from serving.models.layers import ColumnParallel, RowParallel, Shard
from serving.models.weights import TensorSource


@dataclass(frozen=True)
class Layer:
    """One decoder layer's weights on this rank."""

    input_norm: torch.Tensor  # [d]
    qkv: ColumnParallel  # [(H + 2K) D, d]
    attention_out: RowParallel  # [d, H D]
    mlp_norm: torch.Tensor  # [d]
    gate_up: ColumnParallel  # [2f, d]
    down: RowParallel  # [d, f]


class Llama:
    """One rank's part of a model. Embeddings are whole on every rank, the head on rank 0 only.

    Raises ModelFileError when a tensor is missing, misshapen, or has a bias Llama does not know.
    """

    def __init__(self, spec: ModelSpec, source: TensorSource, device: torch.device, shard: Shard) -> None:
        refuse_biases(spec, source)
        self.spec = spec
        self.num_heads = spec.num_heads // shard.world_size
        self.num_kv_heads = spec.num_kv_heads // shard.world_size
        table = (spec.vocab_size, spec.hidden_size)
        self._frequencies = rotary_frequencies(spec).to(device)
        self._embedding = source.tensor("model.embed_tokens.weight", table).to(device)
        self._norm = source.tensor("model.norm.weight", (spec.hidden_size,)).to(device)
        self._layers = [_load_layer(spec, source, i, device, shard) for i in range(spec.num_layers)]
        self._head: PackedWeight | None = None
        if shard.rank == 0:
            tied = spec.tie_word_embeddings
            head = self._embedding if tied else source.tensor("lm_head.weight", table).to(device)
            self._head = pack_weight(head)

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and activations."""
        return self._embedding.dtype

    def forward(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        kv_cache: Sequence[torch.Tensor],
        batch: AttentionBatch,
    ) -> torch.Tensor:
        """Hidden states [T, d] of token_ids [T] at positions [T], before the final norm.

        `kv_cache`, a [2, N, K, block_tokens, D] for each layer, receives the tokens' keys and values.
        """
        eps = self.spec.rms_norm_eps
        cos, sin = rope_table(positions, self._frequencies)
        residual = F.embedding(token_ids, self._embedding)
        x = torch.zeros_like(residual)
        for layer, cache in zip(self._layers, kv_cache, strict=True):
            x, residual = add_rms_norm(x, residual, layer.input_norm, eps)
            x = self._attend(layer, x, cos, sin, cache, batch)
            x, residual = add_rms_norm(x, residual, layer.mlp_norm, eps)
            x = layer.down(swiglu(layer.gate_up(x)))
        return residual + x

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Float32 logits [S, V] of hidden [S, d]; on rank 0 only."""
        assert self._head is not None, "only rank 0 holds the head"
        return linear(rms_norm(hidden, self._norm, self.spec.rms_norm_eps), self._head).float()

    def _attend(
        self,
        layer: Layer,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        cache: torch.Tensor,
        batch: AttentionBatch,
    ) -> torch.Tensor:
        heads = layer.qkv(x).unflatten(-1, (-1, self.spec.head_dim))  # [T, H + 2K, D]
        queries = rope_and_write_kv(heads, self.num_heads, cos, sin, cache, batch.slots)
        return layer.attention_out(paged_attention(queries, cache, batch).flatten(1))


def _load_layer(
    spec: ModelSpec, source: TensorSource, index: int, device: torch.device, shard: Shard
) -> Layer:
    prefix = f"model.layers.{index}"
    d, f = spec.hidden_size, spec.intermediate_size
    query_rows, kv_rows = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    qkv_names = tuple(f"{prefix}.self_attn.{part}_proj.weight" for part in "qkv")
    gate_up_names = tuple(f"{prefix}.mlp.{part}_proj.weight" for part in ("gate", "up"))
    return Layer(
        input_norm=source.tensor(f"{prefix}.input_layernorm.weight", (d,)).to(device),
        qkv=ColumnParallel.load(source, qkv_names, (query_rows, kv_rows, kv_rows), d, shard, device),
        attention_out=RowParallel.load(
            source, f"{prefix}.self_attn.o_proj.weight", d, query_rows, shard, device
        ),
        mlp_norm=source.tensor(f"{prefix}.post_attention_layernorm.weight", (d,)).to(device),
        gate_up=ColumnParallel.load(source, gate_up_names, (f, f), d, shard, device),
        down=RowParallel.load(source, f"{prefix}.mlp.down_proj.weight", d, f, shard, device),
    )


def refuse_biases(spec: ModelSpec, source: TensorSource) -> None:
    """Raises ModelFileError where a tensor would be ignored."""
    biases = [name for name in source.names() if name.endswith(".bias")]
    if biases:
        raise ModelFileError(f"tensor {biases[0]}: {spec.architecture} with biases is not supported")


def rotary_frequencies(spec: ModelSpec) -> torch.Tensor:
    """Radians a position, float32 [D / 2], with the model's scaling."""
    frequencies = rope_frequencies(spec.head_dim, spec.rope_theta)
    scaling = spec.rope_scaling
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return scale_linear(frequencies, scaling.factor)
    return scale_llama3(
        frequencies,
        factor=scaling.factor,
        low_freq_factor=scaling.low_freq_factor,
        high_freq_factor=scaling.high_freq_factor,
        original_context_tokens=scaling.original_max_position_embeddings,
    )
