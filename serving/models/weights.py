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
from safetensors import SafetensorError, safe_open

from serving.errors import ModelFileError
from serving.model_spec import ModelSpec
from serving.models.gguf_file import GgufFile

ALL = slice(None)

# GGUF's names of a llama's tensors, by Hugging Face's.
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
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_LAYER_NAME = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")


class TensorSource(Protocol):
    """Named tensors of one model."""

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
    """A llama-family GGUF file, dequantised tensor by tensor.

    llama.cpp stores query and key rows so that a rotary pair is adjacent; they are put back into
    Hugging Face's order, where a pair is half a head apart.
    """

    def __init__(self, path: Path, spec: ModelSpec, dtype: torch.dtype) -> None:
        self._path = path
        self._file = GgufFile(path)
        architecture = self._file.metadata.get("general.architecture")
        if architecture != "llama":
            raise ModelFileError(
                f"{path}: GGUF architecture {architecture} is not supported; supported: llama"
            )
        self._head_dim = spec.head_dim
        self._dtype = dtype

    def names(self) -> list[str]:
        return list(self._file.tensors)

    def tensor(
        self, name: str, shape: tuple[int, ...], rows: slice = ALL, columns: slice = ALL
    ) -> torch.Tensor:
        stored = self._file.tensors.get(_gguf_name(name))
        if stored is None:
            raise ModelFileError(f"{self._path}: tensor {_gguf_name(name)} ({name}) is missing")
        _check_shape(self._path, name, stored.shape, shape)
        try:
            values = gguf.quants.dequantize(self._file.read(stored)[rows], stored.kind)
        except NotImplementedError as unknown:
            raise ModelFileError(
                f"{self._path}: tensor {name} is quantised as {stored.kind.name}, which is not supported; "
                "convert the file to another quantisation, such as Q8_0"
            ) from unknown
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            values = _unpermute(values, self._head_dim)
        if values.ndim == 2:
            values = values[:, columns]
        return torch.from_numpy(np.array(values)).to(self._dtype)


class SafetensorsSource:
    """Safetensors files that together hold one model."""

    def __init__(self, paths: tuple[Path, ...], dtype: torch.dtype) -> None:
        self._paths = paths
        self._dtype = dtype
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
        return values.to(self._dtype, copy=True)


def _gguf_name(name: str) -> str:
    layer = _LAYER_NAME.fullmatch(name)
    if layer is None:
        return _GGUF_NAMES[name]
    number, part, suffix = layer.groups()
    return f"blk.{number}.{_GGUF_LAYER_NAMES[part]}.{suffix}"


def _unpermute(values: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows (heads, D/2, 2) -> (heads, 2, D/2): the inverse of llama.cpp's convert_hf_to_gguf."""
    pairs = values.reshape(-1, head_dim // 2, 2, values.shape[1])
    return pairs.swapaxes(1, 2).reshape(values.shape)


def _check_shape(path: Path, name: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    if found != wanted:
        raise ModelFileError(
            f"{path}: tensor {name} has shape {found}, but the model's config asks for {wanted}"
        )
