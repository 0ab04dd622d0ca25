"""What this machine's memory and cores, or its GPU, give, measured in tens of milliseconds.

    bytes/s = bytes of a buffer larger than the caches / time to sum it
    FLOP/s  = 2·m·k·n / time of a matrix product [m, k] · [k, n]

On the threads that PyTorch is set to use, by the kernels that steps run on: the native library's where
it is there, else PyTorch's. Each is the best of a few tries, because what is sought is the ceiling and
every disturbance lowers the figure. A GPU is given larger sizes and several runs behind one another, for a
launch takes as long as a small run.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from kernels.cpu import library as native
from kernels.cpu.packing import Arena, pack, quantize_groups

_ROWS = 240
_TRIES = 3
_SLOW_S = 0.1  # a try that takes so long is precise enough alone
_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True)
class _Sizes:
    """`runs` follow one another in a try."""

    buffer_bytes: int
    product: int
    runs: int


_SIZES = {"cpu": _Sizes(128 << 20, 768, 1), "cuda": _Sizes(512 << 20, 4096, 10)}


def measure_bytes_per_s(device: str = "cpu") -> float:
    """Bytes a second that all threads together read from memory."""
    num_bytes = _SIZES[device].buffer_bytes
    buffer = torch.ones(num_bytes // 4, dtype=torch.float32, device=device)
    return num_bytes / _best_s(lambda: buffer.sum(), device)


def measure_flops_per_s(dtype: str, device: str = "cpu") -> float:
    """Operations a second of a matrix product in `dtype`; formats not listed are taken as int8."""
    kind = _DTYPES.get(dtype, torch.int8)
    size = _SIZES[device].product
    left, right = (torch.ones(size, size, device=device).to(kind) for _ in range(2))
    product = torch._int_mm if kind is torch.int8 else torch.matmul
    return 2 * size**3 / _best_s(lambda: product(left, right), device)


def _native_product(dtype: str, library: ctypes.CDLL) -> Callable[[], object]:
    size = _SIZES["cpu"].product
    weight = torch.randn(size, size)
    packed = pack(quantize_groups(weight) if dtype == "int8" else weight.bfloat16(), Arena(), library)
    norm, rows, out = torch.ones(size), torch.ones(_ROWS, size), torch.empty(_ROWS, size)
    model = native.Model(hidden=size, threads=torch.get_num_threads(), is_int8=dtype == "int8", eps=1e-5)
    workspace = native.Workspace(library)
    return lambda: library.searoom_head(
        model,
        workspace.handle,
        packed.struct,
        norm.data_ptr(),
        rows.data_ptr(),
        _ROWS,
        out.data_ptr(),
    )


def measure(dtype: str, device: str = "cpu") -> tuple[float, float]:
    """FLOP/s and bytes/s."""
    return measure_flops_per_s(dtype, device), measure_bytes_per_s(device)


def _best_s(run: Callable[[], object], device: str) -> float:
    times = []
    runs = _SIZES[device].runs
    for _ in range(1 + _TRIES):  # the first finds kernels and pages
        started_s = time.perf_counter()
        with torch.inference_mode():
            for _ in range(runs):
                run()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append((time.perf_counter() - started_s) / runs)
        if times[0] > _SLOW_S:
            break
    return min(times)
