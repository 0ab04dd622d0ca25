"""The Llama architecture on `kernels/cpu/forward.cpp`: a whole step in one native call.

Weights are in bfloat16, or in 8 or 4 bits where a GGUF file stores them so. What they are multiplied
with is rounded to the precision: bfloat16, or 8 bits ("int8", for which weights that are stored wider
are rounded too). Activations between layers are float32, the KV cache bfloat16.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from kernels.cpu import library as native
from kernels.cpu.packing import GROUP, Arena, GroupQuantized, PackedMatrix, pack, stack
from serving.model_spec import ModelSpec
from serving.models.layers import Shard
from serving.models.llama import refuse_biases, rotary_frequencies
from serving.models.weights import ALL, TensorSource

Precision = Literal["bfloat16", "int8"]
Ints = NDArray[np.int32]
Weight = torch.Tensor | GroupQuantized

_ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM")  # the same, but for windows
_HEAD_DIMS = (32, 64, 128, 256)
_MOST_SHARING = 48  # query heads of a key/value head: `kQueryRows` of attention.h


def unsupported(spec: ModelSpec, world_size: int, block_tokens: int) -> str | None:
    """Why `forward.cpp` cannot run this model split so, or None."""
    if spec.architecture not in _ARCHITECTURES or spec.windows:
        windowed = " with a sliding window" if spec.windows else ""
        return f"{spec.architecture}{windowed} is none of {_ARCHITECTURES} without one"
    widths = (
        spec.hidden_size,
        spec.num_heads * spec.head_dim // world_size,
        spec.intermediate_size // world_size,
    )
    if spec.head_dim not in _HEAD_DIMS:
        return f"head dim {spec.head_dim} is none of {_HEAD_DIMS}"
    if spec.num_heads // spec.num_kv_heads > _MOST_SHARING:
        return f"{spec.num_heads // spec.num_kv_heads} query heads share a KV head, more than {_MOST_SHARING}"
    if any(width % GROUP for width in widths):
        return f"the widths {widths} of a rank's matrices are not all multiples of {GROUP}"
    if block_tokens % 16:
        return f"block_tokens {block_tokens} is not a multiple of 16"
    return None


@dataclass(frozen=True, slots=True, eq=False)
class _Layer:
    input_norm: torch.Tensor  # float32 [d]
    mlp_norm: torch.Tensor
    qkv: PackedMatrix
    out: PackedMatrix
    gate_up: PackedMatrix
    down: PackedMatrix


class NativeLlama:
    """One rank's part of a model, on CPU. The head, and a tied embedding in it, is on rank 0 only.

    For models of which `unsupported` has nothing to say. Raises ModelFileError as `Llama` does. To
    be used by one thread at a time, after `attach`.
    """

    def __init__(
        self,
        spec: ModelSpec,
        source: TensorSource,
        shard: Shard,
        precision: Precision,
        library: ctypes.CDLL,
    ) -> None:
        refuse_biases(spec, source)
        self.spec = spec
        self.num_kv_heads = spec.num_kv_heads // shard.world_size
        self.library = library
        self._shard = shard
        self._precision = precision
        loader = _Loader(spec, source, shard, precision, library)
        self._layers = [loader.layer(i) for i in range(spec.num_layers)]
        self._norm = loader.norm("model.norm")
        self._head: PackedMatrix | None = None
        self._embedding: torch.Tensor | None = None
        if shard.rank == 0 and spec.tie_word_embeddings:
            self._head = loader.table("model.embed_tokens")
        else:
            self._embedding = loader.embedding()
            self._head = loader.table("lm_head") if shard.rank == 0 else None
        self._frequencies = rotary_frequencies(spec).contiguous()
        self._workspace = native.Workspace(library)

    def attach(self, kv_cache: torch.Tensor, num_threads: int) -> None:
        """Run on so many threads, over `kv_cache`: bfloat16 [layers, 2, N, K, block_tokens, D]."""
        assert kv_cache.dtype == torch.bfloat16 and kv_cache.is_contiguous()
        self._kv_cache = kv_cache
        self.num_threads = num_threads
        self._layer_structs = self._make_layer_structs()
        self._model = self._make_model_struct()

    @property
    def bytes_per_weight(self) -> float:
        """Of this rank's matrices, scales included."""
        matrices = [m for x in self._layers for m in (x.qkv, x.out, x.gate_up, x.down)]
        matrices += [self._head] if self._head is not None else []
        return sum(m.nbytes for m in matrices) / sum(m.struct.n * m.struct.k for m in matrices)

    def forward(
        self,
        token_ids: Ints,
        positions: Ints,
        slot_mapping: Ints,
        query_start: Ints,
        context_lens: Ints,
        block_tables: Ints,
        rows: Ints,
    ) -> torch.Tensor:
        """Hidden states float32 [S, d] of `rows` before the final norm; arrays as in a step's plan.

        Raises IndexError for a token id beyond the vocabulary: C++ would read whatever lies there.
        """
        if token_ids.min() < 0 or token_ids.max() >= self.spec.vocab_size:
            raise IndexError(f"token ids {token_ids.min()} to {token_ids.max()}, of {self.spec.vocab_size}")
        x = self._embed(token_ids)
        delta = torch.empty_like(x)
        arrays = (positions, slot_mapping, query_start, context_lens, block_tables)
        held = [np.ascontiguousarray(array, dtype=np.int32) for array in arrays]
        step = native.Step(
            len(token_ids),
            len(context_lens),
            block_tables.shape[1],
            *(array.ctypes.data for array in held),
            x.data_ptr(),
            delta.data_ptr(),
        )
        half_layers = 2 * self.spec.num_layers
        stride = half_layers if self._shard.world_size == 1 else 1
        for first in range(0, half_layers, stride):
            self.library.searoom_run(self._model, step, self._workspace.handle, first, first + stride)
            if stride == 1:
                self._shard.all_reduce(delta)
        wanted = torch.from_numpy(rows)
        return x.index_select(0, wanted).add_(delta.index_select(0, wanted))

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Float32 logits [S, V] of hidden [S, d]; on rank 0 only."""
        assert self._head is not None, "only rank 0 holds the head"
        hidden = hidden.contiguous()
        logits = torch.empty(len(hidden), self._head.struct.n)
        self.library.searoom_head(
            self._model,
            self._workspace.handle,
            self._head.struct,
            self._norm.data_ptr(),
            hidden.data_ptr(),
            len(hidden),
            logits.data_ptr(),
        )
        return logits[:, : self.spec.vocab_size]

    def run_linears(self, num_tokens: int) -> None:
        """The matrix products of a step of so many tokens and nothing else: a bound for benchmarks."""
        assert self._head is not None, "only rank 0 holds the head"
        delta = torch.empty(num_tokens, self.spec.hidden_size)
        logits = torch.empty(num_tokens, self._head.struct.n)
        self.library.searoom_linears(
            self._model,
            self._workspace.handle,
            self._head.struct,
            self.spec.num_layers,
            num_tokens,
            delta.data_ptr(),
            logits.data_ptr(),
        )

    def _embed(self, token_ids: Ints) -> torch.Tensor:
        if self._embedding is not None:
            return torch.nn.functional.embedding(torch.from_numpy(token_ids), self._embedding).float()
        assert self._head is not None
        out = torch.empty(len(token_ids), self.spec.hidden_size)
        ids = np.ascontiguousarray(token_ids, dtype=np.int32)
        self.library.searoom_rows(
            self._head.struct, ids.ctypes.data, len(ids), self.num_threads, out.data_ptr()
        )
        return out

    def _make_layer_structs(self) -> ctypes.Array[native.Layer]:
        structs = [
            native.Layer(
                layer.input_norm.data_ptr(),
                layer.mlp_norm.data_ptr(),
                layer.qkv.struct,
                layer.out.struct,
                layer.gate_up.struct,
                layer.down.struct,
                cache.data_ptr(),
            )
            for layer, cache in zip(self._layers, self._kv_cache, strict=True)
        ]
        return (native.Layer * len(structs))(*structs)

    def _make_model_struct(self) -> native.Model:
        spec, ranks = self.spec, self._shard.world_size
        num_blocks, num_kv_heads, block_tokens, head_dim = self._kv_cache.shape[2:]
        return native.Model(
            hidden=spec.hidden_size,
            heads=spec.num_heads // ranks,
            kv_heads=num_kv_heads,
            head_dim=head_dim,
            ffn=spec.intermediate_size // ranks,
            block_tokens=block_tokens,
            num_blocks=num_blocks,
            threads=self.num_threads,
            is_int8=self._precision == "int8",
            eps=spec.rms_norm_eps,
            frequencies=self._frequencies.data_ptr(),
            layers=self._layer_structs,
        )


class _Loader:
    """Reads a rank's weights from a source, fused and packed."""

    def __init__(
        self, spec: ModelSpec, source: TensorSource, shard: Shard, precision: Precision, library: ctypes.CDLL
    ) -> None:
        self._spec, self._source, self._shard = spec, source, shard
        self._precision = precision
        self._library = library
        self._arena = Arena()

    def layer(self, index: int) -> _Layer:
        prefix = f"model.layers.{index}"
        d, f = self._spec.hidden_size, self._spec.intermediate_size
        query_rows = self._spec.num_heads * self._spec.head_dim
        kv_rows = self._spec.num_kv_heads * self._spec.head_dim
        qkv = [
            self._rows(f"{prefix}.self_attn.{part}_proj", rows, d)
            for part, rows in (("q", query_rows), ("k", kv_rows), ("v", kv_rows))
        ]
        gate, up = (self._rows(f"{prefix}.mlp.{part}_proj", f, d) for part in ("gate", "up"))
        return _Layer(
            input_norm=self.norm(f"{prefix}.input_layernorm"),
            mlp_norm=self.norm(f"{prefix}.post_attention_layernorm"),
            qkv=self._pack(_stack(qkv)),
            out=self._pack(self._columns(f"{prefix}.self_attn.o_proj", d, query_rows)),
            gate_up=self._pack(_interleave(_stack([gate, up]))),
            down=self._pack(self._columns(f"{prefix}.mlp.down_proj", d, f)),
        )

    def norm(self, name: str) -> torch.Tensor:
        return self._source.tensor(f"{name}.weight", (self._spec.hidden_size,)).float()

    def table(self, name: str) -> PackedMatrix:
        """A [V, d] table as a matrix to multiply with."""
        return self._pack(self._read(f"{name}.weight", (self._spec.vocab_size, self._spec.hidden_size)))

    def embedding(self) -> torch.Tensor:
        shape = (self._spec.vocab_size, self._spec.hidden_size)
        return self._source.tensor("model.embed_tokens.weight", shape).to(torch.bfloat16)

    def _rows(self, name: str, rows: int, columns: int) -> Weight:
        return self._read(f"{name}.weight", (rows, columns), rows=self._shard.part(rows))

    def _columns(self, name: str, rows: int, columns: int) -> Weight:
        return self._read(f"{name}.weight", (rows, columns), columns=self._shard.part(columns))

    def _read(self, name: str, shape: tuple[int, int], rows: slice = ALL, columns: slice = ALL) -> Weight:
        if self._precision == "int8" or self._source.is_quantized(name):
            return self._source.groups(name, shape, rows, columns)
        return self._source.tensor(name, shape, rows, columns).to(torch.bfloat16)

    def _pack(self, weight: Weight) -> PackedMatrix:
        return pack(weight, self._arena, self._library)


def _stack(parts: list[Weight]) -> Weight:
    """Outputs one after another; what is stored in unlike ways becomes bfloat16 or 8 bits."""
    quantized = [part for part in parts if isinstance(part, GroupQuantized)]
    if len(quantized) == len(parts):
        return stack(quantized)
    return torch.cat([p if isinstance(p, torch.Tensor) else p.dequantize().bfloat16() for p in parts])


def _interleave(gate_up: Weight) -> Weight:
    """Rows [gates, ups] as 32 gates, their 32 ups, and so on: a unit of work then has both."""
    if isinstance(gate_up, torch.Tensor):
        return gate_up[torch.from_numpy(_interleaved(len(gate_up)))]
    return gate_up.rows(_interleaved(len(gate_up.values)))


def _interleaved(num_rows: int) -> NDArray[np.intp]:
    return np.arange(num_rows).reshape(2, -1, GROUP).swapaxes(0, 1).reshape(-1)
