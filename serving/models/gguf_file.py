"""A GGUF file's scalar metadata and tensor directory.

    "GGUF" | version u32 | tensors u64 | keys u64
    keys     × (name, type u32, value)
    tensors  × (name, dimensions u32, sizes u64..., kind u32, offset u64)
    padding to `general.alignment`, then the tensors' bytes

(ggml's docs/gguf.md; little-endian.) `gguf.GGUFReader` reads the same, but makes an array of every
token of the vocabulary: seconds of start-up on every rank. Here arrays are stepped over.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from numpy.typing import NDArray

from serving.errors import ModelFileError

_SCALARS = {
    GGUFValueType.UINT8: "<B",
    GGUFValueType.INT8: "<b",
    GGUFValueType.UINT16: "<H",
    GGUFValueType.INT16: "<h",
    GGUFValueType.UINT32: "<I",
    GGUFValueType.INT32: "<i",
    GGUFValueType.FLOAT32: "<f",
    GGUFValueType.UINT64: "<Q",
    GGUFValueType.INT64: "<q",
    GGUFValueType.FLOAT64: "<d",
    GGUFValueType.BOOL: "<?",
}
_SUPPORTED_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32
_MAX_DIMENSIONS = 4

Scalar = str | int | float | bool


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies; `shape` in row-major order, `offset_bytes` from the file's start."""

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    offset_bytes: int
    size_bytes: int


class GgufFile:
    """A memory-mapped GGUF file. Raises ModelFileError when it is not a whole one."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            with path.open("rb") as file:
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as unreadable:
            raise ModelFileError(f"{path} cannot be read: {unreadable}") from unreadable
        try:
            self.metadata, self.tensors = _read_directory(self._data)
        except (struct.error, ValueError, KeyError, OverflowError) as broken:
            raise ModelFileError(
                f"{path} is not a whole GGUF file ({broken}): fetch the file again"
            ) from broken
        for tensor in self.tensors.values():
            if tensor.offset_bytes + tensor.size_bytes > len(self._data):
                raise ModelFileError(
                    f"{path} is truncated: tensor {tensor.name} ends at byte "
                    f"{tensor.offset_bytes + tensor.size_bytes}, the file at {len(self._data)}: "
                    "fetch the file again"
                )

    def read(self, tensor: StoredTensor) -> NDArray[np.uint8]:
        """The stored bytes as [..., bytes a row], read-only and not copied."""
        flat = np.frombuffer(self._data, dtype=np.uint8, count=tensor.size_bytes, offset=tensor.offset_bytes)
        return flat.reshape(*tensor.shape[:-1], -1)


class _Cursor:
    """A place in the file that moves as it reads."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self.at = 0

    def scalar(self, layout: str) -> int:
        (value,) = struct.unpack_from(layout, self._data, self.at)
        self.at += struct.calcsize(layout)
        return value

    def text(self) -> str:
        size = self.scalar("<Q")
        start, self.at = self.at, self.at + size
        if self.at > len(self._data):
            raise ValueError(f"a text of {size} bytes runs past the end")
        return self._data[start : self.at].decode()

    def skip_array(self) -> None:
        kind, count = GGUFValueType(self.scalar("<I")), self.scalar("<Q")
        if kind == GGUFValueType.STRING:
            unpack, at = struct.Struct("<Q").unpack_from, self.at
            for _ in range(count):
                at += 8 + unpack(self._data, at)[0]
            self.at = at
        else:
            self.at += count * struct.calcsize(_SCALARS[kind])  # KeyError: arrays do not nest

    def value(self) -> Scalar | None:
        """The scalar or text here; None for an array."""
        kind = GGUFValueType(self.scalar("<I"))
        if kind == GGUFValueType.ARRAY:
            self.skip_array()
            return None
        return self.text() if kind == GGUFValueType.STRING else self.scalar(_SCALARS[kind])


def _read_directory(data: mmap.mmap) -> tuple[dict[str, Scalar], dict[str, StoredTensor]]:
    if data[:4] != b"GGUF":
        raise ValueError("it does not begin with 'GGUF'")
    cursor = _Cursor(data)
    cursor.at = 4
    version = cursor.scalar("<I")
    if version not in _SUPPORTED_VERSIONS:
        raise ValueError(f"version {version}; supported are {_SUPPORTED_VERSIONS}")
    num_tensors, num_keys = cursor.scalar("<Q"), cursor.scalar("<Q")
    metadata: dict[str, Scalar] = {}
    for _ in range(num_keys):
        name, value = cursor.text(), cursor.value()
        if value is not None:
            metadata[name] = value
    entries = [_read_entry(cursor) for _ in range(num_tensors)]
    alignment = int(metadata.get("general.alignment", _DEFAULT_ALIGNMENT))
    if alignment <= 0:
        raise ValueError(f"alignment {alignment}")
    start = -(-cursor.at // alignment) * alignment
    return metadata, {
        name: StoredTensor(name, shape, kind, start + offset, _size_bytes(shape, kind))
        for name, shape, kind, offset in entries
    }


def _read_entry(cursor: _Cursor) -> tuple[str, tuple[int, ...], GGMLQuantizationType, int]:
    name = cursor.text()
    dimensions = cursor.scalar("<I")
    if not 1 <= dimensions <= _MAX_DIMENSIONS:
        raise ValueError(f"tensor {name} has {dimensions} dimensions")
    sizes = [cursor.scalar("<Q") for _ in range(dimensions)]
    kind = GGMLQuantizationType(cursor.scalar("<I"))
    return name, tuple(reversed(sizes)), kind, cursor.scalar("<Q")


def _size_bytes(shape: tuple[int, ...], kind: GGMLQuantizationType) -> int:
    block_values, block_bytes = GGML_QUANT_SIZES[kind]
    if shape[-1] % block_values:
        raise ValueError(f"a row of {shape[-1]} values is not whole blocks of {block_values}")
    return prod(shape) // block_values * block_bytes
