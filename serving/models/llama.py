"""The Llama architecture: RMSNorm, rotary grouped-query attention, SwiGLU (Touvron et al. 2023).

Its relatives (Mistral, Qwen3) are the same but for a window, norms of the heads, or another MLP: each is
a `load_layer` of its own.

T tokens of the step, d hidden size, H query heads and K key/value heads of this rank, D head dim,
f this rank's MLP width, V vocabulary, S rows whose logits are wanted
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F

from kernels.linear import PackedWeight, WeightFormat, linear, pack_weight
from kernels.paged_attention import AttentionBatch, paged_attention
from kernels.rms_norm import add_rms_norm, rms_norm
from kernels.rope import rope_frequencies, rope_table, scale_linear, scale_llama3
from kernels.rope_kv import QkNorm, rope_and_write_kv
from kernels.swiglu import swiglu
from serving.errors import ModelFileError
from serving.model_spec import ModelSpec
from serving.models.layers import ColumnParallel, Loader, RowParallel, Shard
from serving.models.weights import TensorSource


class Mlp(Protocol):
    """What follows attention in a layer: x [T, d] -> [T, d], summed over ranks."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor: ...

    def weights(self) -> Iterator[PackedWeight]:
        """What a step reads of memory."""
        ...


@dataclass(frozen=True)
class Attention:
    """One layer's attention on this rank."""

    qkv: ColumnParallel  # [(H + 2K) D, d]
    out: RowParallel  # [d, H D]
    num_heads: int
    head_dim: int
    norm: QkNorm | None = None
    window: int | None = None

    def __call__(
        self,
        x: torch.Tensor,
        rope: tuple[torch.Tensor, torch.Tensor],
        cache: torch.Tensor,
        batch: AttentionBatch,
    ) -> torch.Tensor:
        heads = self.qkv(x).unflatten(-1, (-1, self.head_dim))  # [T, H + 2K, D]
        queries = rope_and_write_kv(heads, self.num_heads, *rope, cache, batch.slots, norm=self.norm)
        return self.out(paged_attention(queries, cache, batch, window=self.window).flatten(1))


@dataclass(frozen=True)
class SwigluMlp:
    """down(swiglu(gate_up x))."""

    gate_up: ColumnParallel  # [2f, d]
    down: RowParallel  # [d, f]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(swiglu(self.gate_up(x)))

    def weights(self) -> Iterator[PackedWeight]:
        yield from (self.gate_up.weight, self.down.weight)


@dataclass(frozen=True)
class Layer:
    """One decoder layer's weights on this rank."""

    input_norm: torch.Tensor  # [d]
    attention: Attention
    mlp_norm: torch.Tensor  # [d]
    mlp: Mlp


def load_attention(loader: Loader, index: int, norm: QkNorm | None = None) -> Attention:
    """Layer `index`'s, with its window where the model has one."""
    spec, prefix = loader.spec, f"model.layers.{index}.self_attn"
    query_rows, kv_rows = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    names = tuple(f"{prefix}.{part}_proj.weight" for part in "qkv")
    return Attention(
        qkv=loader.column_parallel(names, (query_rows, kv_rows, kv_rows), spec.hidden_size),
        out=loader.row_parallel(f"{prefix}.o_proj.weight", spec.hidden_size, query_rows),
        num_heads=spec.num_heads // loader.shard.world_size,
        head_dim=spec.head_dim,
        norm=norm,
        window=spec.window(index),
    )


def load_mlp(loader: Loader, index: int) -> SwigluMlp:
    """Layer `index`'s."""
    d, f, prefix = loader.spec.hidden_size, loader.spec.intermediate_size, f"model.layers.{index}.mlp"
    names = (f"{prefix}.gate_proj.weight", f"{prefix}.up_proj.weight")
    return SwigluMlp(
        gate_up=loader.column_parallel(names, (f, f), d),
        down=loader.row_parallel(f"{prefix}.down_proj.weight", d, f),
    )


def layer_of(loader: Loader, index: int, attention: Attention, mlp: Mlp) -> Layer:
    """Layer `index`: its parts and the norms before them."""
    prefix, d = f"model.layers.{index}", loader.spec.hidden_size
    return Layer(
        input_norm=loader.whole(f"{prefix}.input_layernorm.weight", d),
        attention=attention,
        mlp_norm=loader.whole(f"{prefix}.post_attention_layernorm.weight", d),
        mlp=mlp,
    )


def load_layer(loader: Loader, index: int) -> Layer:
    """Layer `index` of a Llama or a Mistral."""
    return layer_of(loader, index, load_attention(loader, index), load_mlp(loader, index))


class Llama:
    """One rank's part of a model. Embeddings are whole on every rank, the head on rank 0 only; neither is
    quantised, because each of their values weighs on every token.

    Raises ModelFileError when a tensor is missing, misshapen, or has a bias Llama does not know.
    """

    def __init__(
        self,
        spec: ModelSpec,
        source: TensorSource,
        device: torch.device,
        shard: Shard,
        weight_format: WeightFormat = "plain",
        load_layer: Callable[[Loader, int], Layer] = load_layer,
    ) -> None:
        refuse_biases(spec, source)
        self.spec = spec
        self.num_heads = spec.num_heads // shard.world_size
        self.num_kv_heads = spec.num_kv_heads // shard.world_size
        loader = Loader(spec, source, device, shard, weight_format)
        table = (spec.vocab_size, spec.hidden_size)
        self._frequencies = rotary_frequencies(spec).to(device)
        self._embedding = loader.whole("model.embed_tokens.weight", *table)
        self._norm = loader.whole("model.norm.weight", spec.hidden_size)
        self._layers = [load_layer(loader, i) for i in range(spec.num_layers)]
        self._head: PackedWeight | None = None
        if shard.rank == 0:
            tied = spec.tie_word_embeddings
            self._head = pack_weight(self._embedding if tied else loader.whole("lm_head.weight", *table))

    @property
    def dtype(self) -> torch.dtype:
        """Of activations, and of weights that are not quantised."""
        return self._embedding.dtype

    @property
    def bytes_per_weight(self) -> float:
        """Of this rank's matrices, scales included."""
        weights = [self._head] if self._head is not None else []
        for layer in self._layers:
            weights += [layer.attention.qkv.weight, layer.attention.out.weight, *layer.mlp.weights()]
        return sum(weight.nbytes for weight in weights) / sum(weight.num_values for weight in weights)

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
        rope = rope_table(positions, self._frequencies)
        residual = F.embedding(token_ids, self._embedding)
        x = torch.zeros_like(residual)
        for layer, cache in zip(self._layers, kv_cache, strict=True):
            x, residual = add_rms_norm(x, residual, layer.input_norm, eps)
            x = layer.attention(x, rope, cache, batch)
            x, residual = add_rms_norm(x, residual, layer.mlp_norm, eps)
            x = layer.mlp(x)
        return residual + x

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Float32 logits [S, V] of hidden [S, d]; on rank 0 only."""
        assert self._head is not None, "only rank 0 holds the head"
        return linear(rms_norm(hidden, self._norm, self.spec.rms_norm_eps), self._head).float()


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
