"""Where a model's tensors come from: a GGUF file or safetensors files, under Hugging Face's names.

A source reads lazily and converts to the wanted dtype; a rank of a tensor-parallel group asks for
its rows or columns only. Nothing here unpickles or runs code from a model.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Protocol

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from kernels.cpu.packing import GroupQuantized, quantize_groups
from serving.errors import ModelFileError
from serving.model_spec import ModelSpec
from serving.models.gguf_file import GgufFile, StoredTensor

ALL = slice(None)

# GGUF's names of tensors, by Hugging Face's.
_GGUF_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_GGUF_LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_LAYER_NAME = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")


class TensorSource(Protocol):
    """Named tensors of one model."""

    @property
    def dtype(self) -> torch.dtype:
        """Of every tensor it gives."""
        ...

    def names(self) -> list[str]:
        """Every tensor's name as its files spell it."""
        ...

    def tensor(
        self, name: str, shape: tuple[int, ...], rows: slice = ALL, columns: slice = ALL
    ) -> torch.Tensor:
        """`rows` and `columns` of the tensor `name`, whose whole shape must be `shape`.

        `columns` is for matrices only. On CPU, in the source's dtype, owned by the caller.
        Raises ModelFileError when the tensor is missing, misshapen or of an unknown kind.
        """
        ...

    def is_quantized(self, name: str) -> bool:
        """Whether `groups` gives exactly what is stored."""
        ...

    def groups(
        self, name: str, shape: tuple[int, int], rows: slice = ALL, columns: slice = ALL
    ) -> GroupQuantized:
        """The same part of a matrix in 4 or 8 bits: as it is stored where it is, else the nearest.

        `columns` begin and end at multiples of 32. Raises as `tensor` does.
        """
        ...


def open_weights(paths: tuple[Path, ...], spec: ModelSpec, dtype: torch.dtype) -> TensorSource:
    """The source for one .gguf file or for a model's safetensors files."""
    kinds = {path.suffix for path in paths}
    if kinds == {".gguf"} and len(paths) == 1:
        return GgufSource(paths[0], spec, dtype)
    if kinds == {".safetensors"}:
        return SafetensorsSource(paths, dtype)
    raise ModelFileError(
        f"weights {', '.join(map(str, paths)) or '(none)'}: give one .gguf file or all .safetensors files"
    )


class GgufSource:
    """A llama's or a qwen3's GGUF file, dequantised tensor by tensor.

    llama.cpp stores a llama's query and key rows so that a rotary pair is adjacent; they are put back into
    Hugging Face's order, where a pair is half a head apart, as it is in a qwen3.
    """

    def __init__(self, path: Path, spec: ModelSpec, dtype: torch.dtype) -> None:
        self._path = path
        self._file = GgufFile(path)
        architecture = self._file.metadata.get("general.architecture")
        if architecture not in ("llama", "qwen3"):
            raise ModelFileError(
                f"{path}: GGUF architecture {architecture} is not supported; supported: llama, qwen3"
            )
        self._permuted = ("q_proj.weight", "k_proj.weight") if architecture == "llama" else ()
        self._head_dim = spec.head_dim
        self.dtype = dtype

    def names(self) -> list[str]:
        return list(self._file.tensors)

    def tensor(
        self, name: str, shape: tuple[int, ...], rows: slice = ALL, columns: slice = ALL
    ) -> torch.Tensor:
        stored = self._find(name, shape)
        try:
            values = gguf.quants.dequantize(self._file.read(stored)[rows], stored.kind)
        except NotImplementedError as unknown:
            raise ModelFileError(
                f"{self._path}: tensor {name} is quantised as {stored.kind.name}, which is not supported; "
                "convert the file to another quantisation, such as Q8_0"
            ) from unknown
        if name.endswith(self._permuted):
            values = _unpermute(values, self._head_dim)
        if values.ndim == 2:
            values = values[:, columns]
        return torch.from_numpy(np.array(values)).to(self.dtype)

    def is_quantized(self, name: str) -> bool:
        stored = self._file.tensors.get(_gguf_name(name))
        return stored is not None and stored.kind in _GROUP_READERS

    def groups(
        self, name: str, shape: tuple[int, int], rows: slice = ALL, columns: slice = ALL
    ) -> GroupQuantized:
        stored = self._find(name, shape)
        read = _GROUP_READERS.get(stored.kind)
        if read is None:
            return quantize_groups(self.tensor(name, shape, rows, columns))
        quantized = read(self._file.read(stored)[rows])
        if name.endswith(self._permuted):
            order = np.arange(len(quantized.values))[:, None]
            quantized = quantized.rows(_unpermute(order, self._head_dim)[:, 0])
        return quantized.columns(columns)

    def _find(self, name: str, shape: tuple[int, ...]) -> StoredTensor:
        stored = self._file.tensors.get(_gguf_name(name))
        if stored is None:
            raise ModelFileError(f"{self._path}: tensor {_gguf_name(name)} ({name}) is missing")
        _check_shape(self._path, name, stored.shape, shape)
        return stored


class SafetensorsSource:
    """Safetensors files that together hold one model."""

    def __init__(self, paths: tuple[Path, ...], dtype: torch.dtype) -> None:
        self._paths = paths
        self.dtype = dtype
        self._places = {}
        for path in paths:
            try:
                opened = safe_open(path, framework="pt")
                self._places.update({name: (path, opened) for name in opened.keys()})  # noqa: SIM118
            except (SafetensorError, OSError) as broken:
                raise ModelFileError(
                    f"{path} cannot be read as safetensors ({broken}): fetch the file again"
                ) from broken

    def names(self) -> list[str]:
        return list(self._places)

    def tensor(
        self, name: str, shape: tuple[int, ...], rows: slice = ALL, columns: slice = ALL
    ) -> torch.Tensor:
        if name not in self._places:
            raise ModelFileError(
                f"tensor {name} is missing from {', '.join(map(str, self._paths))}: are all of the model's "
                "files there?"
            )
        path, opened = self._places[name]
        stored = opened.get_slice(name)
        _check_shape(path, name, tuple(stored.get_shape()), shape)
        values = stored[rows, columns] if len(shape) == 2 else stored[rows]
        if values.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ModelFileError(
                f"{path}: tensor {name} is {values.dtype}; only float32, bfloat16 and float16 weights are "
                "supported"
            )
        return values.to(self.dtype, copy=True)

    def is_quantized(self, name: str) -> bool:
        return False

    def groups(
        self, name: str, shape: tuple[int, int], rows: slice = ALL, columns: slice = ALL
    ) -> GroupQuantized:
        return quantize_groups(self.tensor(name, shape, rows, columns))


def _gguf_name(name: str) -> str:
    layer = _LAYER_NAME.fullmatch(name)
    if layer is None:
        return _GGUF_NAMES[name]
    number, part, suffix = layer.groups()
    return f"blk.{number}.{_GGUF_LAYER_NAMES[part]}.{suffix}"


def _read_q8_0(rows: NDArray[np.uint8]) -> GroupQuantized:
    """ggml's block_q8_0: f16 scale, 32 int8."""
    blocks = rows.reshape(len(rows), -1, 34)
    values = blocks[..., 2:] ^ np.uint8(0x80)  # int8, offset by 128
    return GroupQuantized(_flat(values), _halves(blocks, 0), None)


def _read_q4_1(rows: NDArray[np.uint8]) -> GroupQuantized:
    """ggml's block_q4_1: f16 scale, f16 minimum, 32 nibbles."""
    blocks = rows.reshape(len(rows), -1, 20)
    return GroupQuantized(_nibbles(blocks[..., 4:]), _halves(blocks, 0), _halves(blocks, 2))


def _read_q4_0(rows: NDArray[np.uint8]) -> GroupQuantized:
    """ggml's block_q4_0: f16 scale, 32 nibbles that stand for -8..7."""
    blocks = rows.reshape(len(rows), -1, 18)
    scales = _halves(blocks, 0)
    return GroupQuantized(_nibbles(blocks[..., 2:]), scales, scales * np.float16(-8))


_GROUP_READERS = {
    gguf.GGMLQuantizationType.Q8_0: _read_q8_0,
    gguf.GGMLQuantizationType.Q4_1: _read_q4_1,
    gguf.GGMLQuantizationType.Q4_0: _read_q4_0,
}


def _halves(blocks: NDArray[np.uint8], at: int) -> NDArray[np.float16]:
    return np.ascontiguousarray(blocks[..., at : at + 2]).view("<f2")[..., 0]


def _nibbles(packed: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Low nibbles are a block's first 16 values, high ones its last."""
    return _flat(np.concatenate((packed & 15, packed >> 4), axis=-1))


def _flat(blocks: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return blocks.reshape(len(blocks), -1)


def _unpermute(values: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows (heads, D/2, 2) -> (heads, 2, D/2): the inverse of llama.cpp's convert_hf_to_gguf."""
    pairs = values.reshape(-1, head_dim // 2, 2, values.shape[1])
    return pairs.swapaxes(1, 2).reshape(values.shape)


def _check_shape(path: Path, name: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    if found != wanted:
        raise ModelFileError(
            f"{path}: tensor {name} has shape {found}, but the model's config asks for {wanted}"
        )
