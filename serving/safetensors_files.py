"""Safetensors weights in a folder: which files, and whether they are whole. Reads headers only.

A file is `u64-LE n ‖ n bytes of JSON ‖ data`; the JSON gives each tensor its `data_offsets`
(https://github.com/huggingface/safetensors, "Format"), and the last of them is the end of the file.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from serving.errors import ModelFileError

_INDEX = "model.safetensors.index.json"
_MAX_HEADER_BYTES = 100 * 1024 * 1024  # the format's own limit
_LFS_POINTER = b"version https://git-lfs"


def find(folder: Path) -> tuple[Path, ...]:
    """The weight files of `folder`, checked whole; empty when it has no safetensors.

    An index decides where there is one; else `model.safetensors` alone; else every *.safetensors.
    Raises ModelFileError naming a file that is missing, truncated or not safetensors.
    """
    index = folder / _INDEX
    single = folder / "model.safetensors"
    if index.is_file():
        files = [folder / name for name in _indexed_names(index)]
    elif single.is_file():
        files = [single]
    else:
        files = sorted(folder.glob("*.safetensors"))
    for file in files:
        _check_whole(file)
    return tuple(file.resolve() for file in files)


def _indexed_names(index: Path) -> list[str]:
    try:
        content = json.loads(index.read_text())
        names = sorted(set(content["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelFileError(f"{index} is broken ({error!r}): fetch it again") from error
    for name in names:
        if Path(name).name != name:
            raise ModelFileError(f"{index} names {name!r}, which is not a file of its own folder")
        if not (index.parent / name).is_file():
            raise ModelFileError(
                f"{index.parent / name} is missing, but {index.name} names it: fetch it again"
            )
    return names


def _check_whole(file: Path) -> None:
    size = file.stat().st_size
    with file.open("rb") as content:
        start = content.read(len(_LFS_POINTER))
        if start == _LFS_POINTER:
            raise ModelFileError(
                f"{file} is a Git LFS pointer, not weights: run `git lfs pull` in its folder"
            )
        header_bytes = struct.unpack("<Q", start[:8])[0] if len(start) >= 8 else size
        if header_bytes > min(size - 8, _MAX_HEADER_BYTES):
            raise ModelFileError(f"{file} is truncated, or not a safetensors file: fetch it again")
        content.seek(8)
        header = _parse_header(file, content.read(header_bytes))
    tensors = [tensor for name, tensor in header.items() if name != "__metadata__"]
    try:
        data_bytes = max((tensor["data_offsets"][1] for tensor in tensors), default=0)
    except (KeyError, IndexError, TypeError) as error:
        raise ModelFileError(f"{file} has a broken header ({error!r}): fetch it again") from error
    if 8 + header_bytes + data_bytes != size:
        raise ModelFileError(
            f"{file} has {size} bytes where its header says {8 + header_bytes + data_bytes}: fetch it again"
        )


def _parse_header(file: Path, raw: bytes) -> dict[str, Any]:
    try:
        header = json.loads(raw)
    except ValueError as error:
        raise ModelFileError(f"{file} has a header that is not JSON: fetch it again") from error
    if not isinstance(header, dict):
        raise ModelFileError(f"{file} has a header that is not a JSON object: fetch it again")
    return header
