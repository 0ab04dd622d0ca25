"""The native library: this folder's C++, compiled once for this machine and kept in the user's cache.

Nothing waits for a compiler: `cached()` gives the library if it is there, `build()` makes it (about
ten seconds) and is called off the serving path. A machine without a compiler or without AVX-512
BF16 and VNNI has no library, and `unsupported()` says why; the torch path serves it.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from ctypes import POINTER, c_float, c_int32, c_void_p
from pathlib import Path

_FOLDER = Path(__file__).parent
_SOURCES = tuple(_FOLDER / name for name in ("forward.cpp", "packing.cpp", "sample.cpp"))
_HEADERS = tuple(_FOLDER / name for name in ("attention.h", "exponential.h", "layout.h", "products.h"))
_NEEDED_FLAGS = {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni", "avx512_bf16", "f16c", "fma"}
_COMPILERS = ("g++", "clang++", "c++")
_OPTIONS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-fPIC", "-shared")
_TIMEOUT_S = 300


class Matrix(ctypes.Structure):
    _fields_ = [
        ("format", c_int32),
        ("n", c_int32),
        ("k", c_int32),
        ("values", c_void_p),
        ("scales", c_void_p),
    ]


class Layer(ctypes.Structure):
    _fields_ = [
        ("input_norm", c_void_p),
        ("mlp_norm", c_void_p),
        ("qkv", Matrix),
        ("out", Matrix),
        ("gate_up", Matrix),
        ("down", Matrix),
        ("cache", c_void_p),
    ]


class Model(ctypes.Structure):
    _fields_ = [
        ("hidden", c_int32),
        ("heads", c_int32),
        ("kv_heads", c_int32),
        ("head_dim", c_int32),
        ("ffn", c_int32),
        ("block_tokens", c_int32),
        ("num_blocks", c_int32),
        ("threads", c_int32),
        ("is_int8", c_int32),
        ("eps", c_float),
        ("frequencies", c_void_p),
        ("layers", POINTER(Layer)),
    ]


class Step(ctypes.Structure):
    _fields_ = [
        ("tokens", c_int32),
        ("sequences", c_int32),
        ("table_width", c_int32),
        ("positions", c_void_p),
        ("slots", c_void_p),
        ("query_start", c_void_p),
        ("context_lens", c_void_p),
        ("block_tables", c_void_p),
        ("x", c_void_p),
        ("delta", c_void_p),
    ]


_SIGNATURES = {
    "searoom_run": (POINTER(Model), POINTER(Step), c_void_p, c_int32, c_int32),
    "searoom_head": (
        POINTER(Model), c_void_p, POINTER(Matrix), c_void_p, c_void_p, c_int32, c_void_p,
    ),
    "searoom_linears": (
        POINTER(Model), c_void_p, POINTER(Matrix), c_int32, c_int32, c_void_p, c_void_p,
    ),
    "searoom_rows": (POINTER(Matrix), c_void_p, c_int32, c_int32, c_void_p),
    "searoom_sample": (
        c_void_p, c_int32, c_int32, c_int32, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_int32,
        c_void_p,
    ),
    "searoom_pack_bf16": (c_void_p, c_int32, c_int32, c_void_p),
    "searoom_pack_q8": (c_void_p, c_int32, c_int32, c_void_p),
    "searoom_pack_q4": (c_void_p, c_int32, c_int32, c_void_p),
    "searoom_free": (c_void_p,),
}  # fmt: skip


class Workspace:
    """Memory that a step works in, grown to the largest one; one step at a time may use it."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self.handle = c_void_p(library.searoom_workspace())

    def __del__(self) -> None:
        self._library.searoom_free(self.handle)


def unsupported() -> str | None:
    """Why this machine cannot run the library, or None."""
    missing = _NEEDED_FLAGS - _cpu_flags()
    if missing:
        return f"this CPU lacks {', '.join(sorted(missing))}"
    if _compiler() is None and not _library_path().exists():
        return f"there is no C++ compiler ({', '.join(_COMPILERS)})"
    return None


def cached() -> ctypes.CDLL | None:
    """The library, if it has been built for this machine and this source."""
    if not _cpu_flags() >= _NEEDED_FLAGS or not _is_ours(_library_path()):
        return None
    return _open(_library_path())


def build() -> ctypes.CDLL:
    """Compile where it is not cached yet. Raises RuntimeError with the compiler's words."""
    why = unsupported()
    if why is not None:
        raise RuntimeError(why)
    path = _library_path()
    if not _is_ours(path):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        compiler = _compiler()
        assert compiler is not None
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".so", delete=False) as file:
            made = Path(file.name)
        try:
            # Beside a serving engine: it must not take a core away from it.
            command = ["nice", "-n", "10", compiler, *_OPTIONS, "-o", str(made), *map(str, _SOURCES)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
            if done.returncode != 0:
                raise RuntimeError(f"{compiler} failed on the native library: {done.stderr.strip()[-2000:]}")
            made.replace(path)  # whole or not at all: several ranks may build at once
        except subprocess.TimeoutExpired as slow:
            raise RuntimeError(f"{compiler} did not end within {_TIMEOUT_S} s") from slow
        finally:
            made.unlink(missing_ok=True)
    return _open(path)


@functools.cache
def _open(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    for name, types in _SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = types, None
    library.searoom_workspace.argtypes, library.searoom_workspace.restype = (), c_void_p
    return library


@functools.cache
def _library_path() -> Path:
    """Named after all that the machine code depends on."""
    compiler = _compiler() or ""
    version = (
        subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
        if compiler
        else ""
    )
    sources = [path.read_text() for path in (*_SOURCES, *_HEADERS)]
    content = "\0".join((*sources, version, " ".join(_OPTIONS), " ".join(sorted(_cpu_flags()))))
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "searoom" / "native" / f"{hashlib.sha256(content.encode()).hexdigest()[:24]}.so"


def _is_ours(path: Path) -> bool:
    """It is there, and nobody else can have written it: it is about to be run."""
    try:
        status = path.stat()
    except OSError:
        return False
    return status.st_uid == os.geteuid() and not status.st_mode & 0o022


@functools.cache
def _compiler() -> str | None:
    return next((found for name in _COMPILERS if (found := shutil.which(name))), None)


@functools.cache
def _cpu_flags() -> frozenset[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.split(":")[1] for line in lines if line.startswith("flags")), "").split())
