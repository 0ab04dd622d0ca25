"""Quantised linear layers for few rows: memory-bound, so all is about reading the weights once.

    out^T [N, M] = W [N, K] x^T [K, M]        N outputs, K inputs, M rows of x (at most 64)

The weights are the left operand: their many rows fill the tensor cores' M dimension whatever the batch,
and on Hopper they go there from registers, where they were just widened.

K is cut into splits so that small N still fills the GPU. Each split writes a partial sum; the last to
arrive at a tile (an integer counter tells) adds them in order of the splits. The cut depends on the
weight's shape alone and the order on nothing, so the result depends on neither timing nor batch size. M is
not specialised on: it changes from step to step, and traffic must not wait for the compiler.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from kernels.gpu.row_quantization import quantize, raw, row_scale
from kernels.gpu.variants import Variant
from kernels.quantized_linear import (
    GROUP,
    Fp8Weight,
    Int4Weight,
    Int8Weight,
    Weight,
    int4_linear_torch,
    int8_linear_torch,
)

MAX_ROWS = 64
PIECEWISE_ROWS = 256
"""Up to so many, the weights are read once for every MAX_ROWS rows: less than it takes to widen them."""

_HALF = tl.constexpr(GROUP // 2)
# Keeps the 132 to 148 multiprocessors of large GPUs busy twice; constant, so that no sum depends on the GPU.
_PROGRAMS = 288
_MIN_STEPS = 4  # of a split: fewer leave the pipeline of loads unfilled


@dataclass(frozen=True)
class Config:
    """A tile of outputs and inputs, and how many warps and loads in flight work on it."""

    block_n: int = 64
    block_k: int = 128
    num_warps: int = 4
    num_stages: int = 4


# The bits of 128 and of 1024: the last of the mantissa weighs 1.
MAGIC = {torch.bfloat16: 0x4300, torch.float16: 0x6400}
_ROW_WARPS = 8
_MAX_REGISTERS = 255  # of a thread: two programs of the largest tile, whose shared memory allows no more
_INT8 = Config()
_INT4 = Config(block_k=GROUP, num_stages=5)
_FP8 = Config()


@triton.jit
def _store_sum(
    total, out, partials, arrivals, rows, tokens, M, N, splits, SPLIT: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Store `total` [BLOCK_N, BLOCK_M], or, with splits, the sum of all of them by the last of them."""
    inside = (rows < N)[:, None] & (tokens < M)[None, :]
    out_at = out + tokens[None, :].to(tl.int64) * N + rows[:, None]
    if SPLIT:
        tile = tl.program_id(0)
        # [splits, M, N]
        at = partials + tokens[None, :] * N + rows[:, None]
        tl.store(at + tl.program_id(1).to(tl.int64) * M * N, total, mask=inside)
        tl.debug_barrier()  # all threads' stores come before the arrival
        if tl.atomic_add(arrivals + tile, 1, sem="acq_rel") == splits - 1:
            whole = tl.zeros_like(total)
            for split in range(splits):
                # Past L1, which may hold what another kernel left.
                whole += tl.load(
                    at + tl.cast(split, tl.int64) * M * N, mask=inside, other=0.0, cache_modifier=".cg"
                )
            tl.store(out_at, whole.to(out.dtype.element_ty), mask=inside)
            tl.store(arrivals + tile, 0)  # for the next launch
    else:
        tl.store(out_at, total.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["M"])
def _int8_kernel(
    x, weight, scale, out, partials, arrivals, M, N, K, steps, splits,
    SPLIT: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    tokens = tl.arange(0, BLOCK_M)
    inner = tl.program_id(1) * steps * BLOCK_K + tl.arange(0, BLOCK_K)
    # Rows past the end are read from the front, and never stored.
    weight_at = weight + (rows % N)[:, None].to(tl.int64) * K + inner[None, :]
    x_at = x + (tokens % M)[None, :] * K + inner[:, None]
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for step in range(steps):
        if EVEN_K:
            w, xs = tl.load(weight_at), tl.load(x_at)
        else:
            left = K - step * BLOCK_K
            w = tl.load(weight_at, mask=(inner < left)[None, :], other=0)
            xs = tl.load(x_at, mask=(inner < left)[:, None], other=0.0)
        total = tl.dot(w.to(xs.dtype), xs, total)
        weight_at += BLOCK_K
        x_at += BLOCK_K
    total *= tl.load(scale + rows % N)[:, None]
    _store_sum(total, out, partials, arrivals, rows, tokens, M, N, splits, SPLIT, BLOCK_N)


@triton.jit(do_not_specialize=["M"])
def _fp8_kernel(
    x, x_scale, weight, scale, out, partials, arrivals, M, N, K, steps, splits,
    SPLIT: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    tokens = tl.arange(0, BLOCK_M)
    inner = tl.program_id(1) * steps * BLOCK_K + tl.arange(0, BLOCK_K)
    weight_at = weight + (rows % N)[:, None].to(tl.int64) * K + inner[None, :]
    x_at = x + (tokens % M)[None, :] * K + inner[:, None]
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for step in range(steps):
        if EVEN_K:
            w, xs = tl.load(weight_at), tl.load(x_at)
        else:
            left = K - step * BLOCK_K
            w = tl.load(weight_at, mask=(inner < left)[None, :], other=0.0)
            xs = tl.load(x_at, mask=(inner < left)[:, None], other=0.0)
        # Hopper's FP8 sums keep about 14 bits: they are added up in float32 at every step.
        total = tl.dot(w, xs, total, max_num_imprecise_acc=BLOCK_K)
        weight_at += BLOCK_K
        x_at += BLOCK_K
    total *= tl.load(scale + rows % N)[:, None] * tl.load(x_scale + tokens % M)[None, :]
    _store_sum(total, out, partials, arrivals, rows, tokens, M, N, splits, SPLIT, BLOCK_N)


@triton.jit(do_not_specialize=["M"])
def _int4_kernel(
    x, weight, scale, zero, out, partials, arrivals, M, N, K, steps, splits,
    SPLIT: tl.constexpr, MAGIC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A step is a group. MAGIC's last bits, where a value 0..15 is put, weigh 1: so MAGIC + q is a float."""
    dtype = x.dtype.element_ty
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    tokens = tl.arange(0, BLOCK_M)
    group = tl.program_id(1) * steps
    half = tl.arange(0, _HALF)
    weight_at = weight + (rows % N)[:, None].to(tl.int64) * (K // 2) + group * _HALF + half[None, :]
    x_at = x + (tokens % M)[None, :] * K + group * BLOCK_K + half[:, None]
    scale_at, zero_at = scale + group * N + rows % N, zero + group * N + rows % N
    next_scale, next_zero = tl.load(scale_at), tl.load(zero_at)
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for step in range(steps):
        step_scale, step_zero = next_scale, next_zero
        packed = tl.load(weight_at).to(tl.int16)
        low = ((packed & 15) | MAGIC).to(dtype, bitcast=True)
        high = ((packed >> 4) | MAGIC).to(dtype, bitcast=True)
        # Fetched a step ahead: only what feeds a dot is pipelined by the compiler.
        ahead = tl.minimum(step + 1, steps - 1) * N
        next_scale, next_zero = tl.load(scale_at + ahead), tl.load(zero_at + ahead)
        offset = (step_zero.to(tl.int16) | MAGIC).to(dtype, bitcast=True)[:, None]
        part = tl.dot(low - offset, tl.load(x_at))
        part = tl.dot(high - offset, tl.load(x_at + _HALF), part)
        total += part * step_scale.to(tl.float32)[:, None]
        weight_at += _HALF
        x_at += BLOCK_K
    _store_sum(total, out, partials, arrivals, rows, tokens, M, N, splits, SPLIT, BLOCK_N)


@triton.jit
def _quantize_rows_kernel(x, out, scale, K, BLOCK_K: tl.constexpr):
    """One row a program; `out` is e4m3's bits."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK_K)[None, :]
    values = tl.load(x + row * K + at, mask=at < K, other=0.0).to(tl.float32)
    step = row_scale(values, False)
    tl.store(out + row * K + at, quantize(values, step, False), mask=at < K)
    tl.store(scale + row + tl.arange(0, 1), step)


def int8_linear(x: torch.Tensor, weight: Int8Weight) -> torch.Tensor:
    """x [M, K] bfloat16 or float16 -> [M, N]; beyond PIECEWISE_ROWS by the library, on widened weights."""
    _check(x, weight.data, weight.data.shape[1], torch.int8)
    if not 0 < len(x) <= PIECEWISE_ROWS:
        return int8_linear_torch(x, weight)
    if len(x) > MAX_ROWS:
        return torch.cat([int8_linear(piece, weight) for piece in x.split(MAX_ROWS)])
    launch = _plan(x, weight, x.shape[1], x.dtype, _INT8)
    _int8_kernel[launch.grid](
        x, weight.data, weight.scale, launch.out, launch.partials, weight.arrivals, *launch.sizes,
        EVEN_K=x.shape[1] % _INT8.block_k == 0, **launch.constants,
    )  # fmt: skip
    return launch.out


def int4_linear(x: torch.Tensor, weight: Int4Weight) -> torch.Tensor:
    """x [M, K] bfloat16 or float16 -> [M, N]; beyond PIECEWISE_ROWS by the library, on widened weights."""
    _check(x, weight.data, 2 * weight.data.shape[1], torch.uint8)
    if not 0 < len(x) <= PIECEWISE_ROWS:
        return int4_linear_torch(x, weight)
    if len(x) > MAX_ROWS:
        return torch.cat([int4_linear(piece, weight) for piece in x.split(MAX_ROWS)])
    launch = _plan(x, weight, x.shape[1], x.dtype, _INT4)
    _int4_kernel[launch.grid](
        x, weight.data, weight.scale, weight.zero, launch.out, launch.partials, weight.arrivals,
        *launch.sizes, MAGIC=MAGIC[x.dtype], **launch.constants,
    )  # fmt: skip
    return launch.out


def fp8_linear(x: torch.Tensor, weight: Fp8Weight) -> torch.Tensor:
    """x [M, K] bfloat16 or float16 -> [M, N]; x is rounded to e4m3 by one more launch."""
    return fp8_product(*quantize_rows(x), weight, x.dtype)


def fp8_product(
    rows: torch.Tensor, row_scale: torch.Tensor, weight: Fp8Weight, dtype: torch.dtype
) -> torch.Tensor:
    """rows [M, K] e4m3, row_scale float32 [M] -> [M, N]; beyond MAX_ROWS by cuBLASLt (`torch._scaled_mm`)."""
    _check(rows, weight.data, weight.data.shape[1], torch.float8_e4m3fn)
    if not 0 < len(rows) <= MAX_ROWS:
        # Row-wise scales are known with a bfloat16 result only.
        wide = torch._scaled_mm(
            rows, weight.data.T, row_scale[:, None], weight.scale[None, :], out_dtype=torch.bfloat16
        )
        return wide.to(dtype)
    launch = _plan(rows, weight, rows.shape[1], dtype, _FP8)
    _fp8_kernel[launch.grid](
        rows, row_scale, weight.data, weight.scale, launch.out, launch.partials, weight.arrivals,
        *launch.sizes, EVEN_K=rows.shape[1] % _FP8.block_k == 0, **launch.constants,
    )  # fmt: skip
    return launch.out


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [M, K], contiguous -> (float8_e4m3fn [M, K], float32 [M]), as kernels.row_quantization has it."""
    if not x.is_contiguous():
        raise ValueError(f"rows must be contiguous; strides are {x.stride()}")
    out = torch.empty_like(x, dtype=torch.float8_e4m3fn)
    scale = torch.empty(len(x), dtype=torch.float32, device=x.device)
    if len(x):
        _quantize_rows_kernel[(len(x),)](
            x, raw(out), scale, x.shape[1], BLOCK_K=triton.next_power_of_2(x.shape[1]), num_warps=_ROW_WARPS
        )
    return out, scale


@dataclass(frozen=True)
class _Launch:
    out: torch.Tensor  # [M, N]
    partials: torch.Tensor  # float32 [splits, M, N]; of no use where there is one split
    grid: tuple[int, int]
    sizes: tuple[int, ...]  # M, N, K, steps, splits
    constants: dict[str, int | bool]


def _plan(x: torch.Tensor, weight: Weight, inputs: int, dtype: torch.dtype, config: Config) -> _Launch:
    tokens, outputs = len(x), len(weight.data)
    out = torch.empty(tokens, outputs, dtype=dtype, device=x.device)
    steps, splits = cut(outputs, inputs, config)
    partials = torch.empty(splits, tokens, outputs, device=x.device) if splits > 1 else out
    constants: dict[str, int | bool] = {
        "SPLIT": splits > 1,
        "BLOCK_M": max(16, triton.next_power_of_2(tokens)),
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "maxnreg": _MAX_REGISTERS,
    }
    grid = (triton.cdiv(outputs, config.block_n), splits)
    return _Launch(out, partials, grid, (tokens, outputs, inputs, steps, splits), constants)


def cut(outputs: int, inputs: int, config: Config) -> tuple[int, int]:
    """(steps of a split, splits) for a weight's shape: as few splits as fill the GPU."""
    steps = triton.cdiv(inputs, config.block_k)
    wanted = triton.cdiv(_PROGRAMS, triton.cdiv(outputs, config.block_n))
    splits = [n for n in range(1, steps + 1) if steps % n == 0 and (n == 1 or steps // n >= _MIN_STEPS)]
    chosen = next((n for n in splits if n >= wanted), splits[-1])
    return steps // chosen, chosen


def _check(x: torch.Tensor, data: torch.Tensor, inputs: int, dtype: torch.dtype) -> None:
    if x.dtype not in MAGIC and x.dtype != dtype:
        raise ValueError(f"activations must be bfloat16, float16 or the weight's {dtype}, not {x.dtype}")
    if x.ndim != 2 or x.shape[1] != inputs:
        raise ValueError(f"activations are {tuple(x.shape)}; the weight has {inputs} inputs")
    if data.dtype != dtype or not data.is_contiguous() or not x.is_contiguous():
        raise ValueError(f"activations and {dtype} weights must be contiguous; weights are {data.dtype}")


def variants() -> Iterator[Variant]:
    """Every tile height and dtype, with splits and without; inputs that do not fill the last step once."""
    for dtype in MAGIC:
        x = _TYPES[dtype]
        for block_m in (16, 32, 64):
            for split in (True, False):
                yield _variant("int4", _int4_kernel, _INT4, x, block_m, split, {"MAGIC": MAGIC[dtype]})
                for name, kernel, config in (("int8", _int8_kernel, _INT8), ("fp8", _fp8_kernel, _FP8)):
                    yield _variant(name, kernel, config, x, block_m, split, {"EVEN_K": True})
        for name, kernel, config in (("int8", _int8_kernel, _INT8), ("fp8", _fp8_kernel, _FP8)):
            yield _variant(name, kernel, config, x, 64, True, {"EVEN_K": False})
        for width in (4096, 16384):
            yield Variant(
                name=f"quantize_rows {x} {width}",
                kernel=_quantize_rows_kernel,
                signature={"x": f"*{x}", "out": "*u8", "scale": "*fp32", "K": "i32"},
                constexprs={"BLOCK_K": width},
                num_warps=_ROW_WARPS,
                num_stages=3,
                aligned=("x", "out", "K"),
            )


_TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
_SIGNATURES = {
    "int8": {"weight": "*i8", "scale": "*fp32"},
    "int4": {"weight": "*u8", "scale": "*{x}", "zero": "*u8"},
    "fp8": {"x_scale": "*fp32", "weight": "*fp8e4nv", "scale": "*fp32"},
}


def _variant(
    name: str,
    kernel: triton.JITFunction,
    config: Config,
    x: str,
    block_m: int,
    split: bool,
    constants: dict[str, int],
) -> Variant:
    pointers = {arg: kind.format(x=x) for arg, kind in _SIGNATURES[name].items()}
    signature = {
        "x": "*fp8e4nv" if name == "fp8" else f"*{x}",
        **pointers,
        "out": f"*{x}",
        "partials": "*fp32" if split else f"*{x}",
        "arrivals": "*i32",
        **dict.fromkeys(("M", "N", "K", "steps", "splits"), "i32"),
    }
    ends = (" split" if split else "") + ("" if constants.get("EVEN_K", True) else " tail")
    blocks = {"BLOCK_M": block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k}
    return Variant(
        name=f"{name} {x} M{block_m}{ends}",
        kernel=kernel,
        signature=signature,
        constexprs={"SPLIT": split, **constants, **blocks},
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        expects=("mma", "cp.async"),
        aligned=("x", *pointers, "out", "partials", "arrivals", "N", "K"),
        min_capability=90 if name == "fp8" else 80,
        max_registers=_MAX_REGISTERS,
    )
