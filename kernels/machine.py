"""What this machine's memory and cores give, measured in tens of milliseconds.

    bytes/s = bytes of a buffer larger than the caches / time to sum it
    FLOP/s  = 2·m·k·n / time of a matrix product [m, k] · [k, n]

On the threads that PyTorch is set to use, by the kernels that steps run on: the native library's where
it is there, else PyTorch's. Each is the best of a few tries, because what is sought is the ceiling and
every disturbance lowers the figure.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable

import torch

from kernels.cpu import library as native
from kernels.cpu.packing import Arena, pack, quantize_groups

_BUFFER_BYTES = 128 << 20
_SIZE = 768
_ROWS = 240
_TRIES = 3
_SLOW_S = 0.1  # a try that takes so long is precise enough alone
_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def measure_bytes_per_s(device: str = "cpu") -> float:
    """Bytes a second that all threads together read from memory."""
    buffer = torch.ones(_BUFFER_BYTES // 4, dtype=torch.float32, device=device)
    return _BUFFER_BYTES / _best_s(lambda: buffer.sum(), device)


def measure_flops_per_s(dtype: str, device: str = "cpu") -> float:
    """Operations a second of a matrix product in `dtype`; formats not listed are taken as int8."""
    kind = _DTYPES.get(dtype, torch.int8)
    left, right = (torch.ones(_SIZE, _SIZE, device=device).to(kind) for _ in range(2))
    product = torch._int_mm if kind is torch.int8 else torch.matmul
    return 2 * _SIZE**3 / _best_s(lambda: product(left, right), device)


def _native_product(dtype: str, library: ctypes.CDLL) -> Callable[[], object]:
    weight = torch.randn(_SIZE, _SIZE)
    packed = pack(quantize_groups(weight) if dtype == "int8" else weight.bfloat16(), Arena(), library)
    norm, rows, out = torch.ones(_SIZE), torch.ones(_ROWS, _SIZE), torch.empty(_ROWS, _SIZE)
    model = native.Model(hidden=_SIZE, threads=torch.get_num_threads(), is_int8=dtype == "int8", eps=1e-5)
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
    for _ in range(1 + _TRIES):  # the first finds kernels and pages
        started_s = time.perf_counter()
        with torch.inference_mode():
            run()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started_s)
        if times[0] > _SLOW_S:
            break
    return min(times)
