"""SwiGLU, one read and one write. Formula in `kernels.swiglu`.

Plain, a program has a tile of a row, so that few tokens still fill the GPU. Quantised, it has the whole row
and goes over it twice, the second time in the cache: the scale needs the largest value of it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from kernels.gpu.row_quantization import quantize, raw, row_scale
from kernels.gpu.variants import Variant

_TILE = 1024
_TILE_WARPS = 4
_QUANTIZED_TILE = 4096
_QUANTIZED_WARPS = 8


@triton.jit
def _gated(gate_up, row, at, width, stride):
    """Columns `at` of one row, float32 [N]; 0 beyond the width."""
    start = gate_up + row * stride
    gate = tl.load(start + at, mask=at < width, other=0.0).to(tl.float32)
    up = tl.load(start + width + at, mask=at < width, other=0.0).to(tl.float32)
    return gate / (1 + tl.exp(-gate)) * up


@triton.jit
def _swiglu_kernel(
    gate_up,  # [T, 2 width]
    out,  # [T, width]
    width,
    stride,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    values = _gated(gate_up, row, at, width, stride)
    tl.store(out + row * width + at, values.to(out.dtype.element_ty), mask=at < width)


@triton.jit
def _swiglu_quantized_kernel(
    gate_up,  # [T, 2 width]
    out,  # [T, width]
    scale,  # float32 [T]
    width,
    stride,
    INT8: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    step = tl.zeros((1,), dtype=tl.float32)
    for tile in range(TILES):
        at = tile * BLOCK + tl.arange(0, BLOCK)
        here = row_scale(_gated(gate_up, row, at, width, stride)[None, :], INT8)
        step = tl.maximum(step, here, propagate_nan=tl.PropagateNan.ALL)
    tl.store(scale + row + tl.arange(0, 1), step)
    for tile in range(TILES):
        at = tile * BLOCK + tl.arange(0, BLOCK)
        values = _gated(gate_up, row, at, width, stride)[None, :]
        places = out + row * width + at
        tl.store(places[None, :], quantize(values, step, INT8), mask=(at < width)[None, :])


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """gate_up [T, 2f] -> [T, f]."""
    _check(gate_up)
    tokens, width = len(gate_up), gate_up.shape[1] // 2
    out = torch.empty(tokens, width, dtype=gate_up.dtype, device=gate_up.device)
    if tokens:
        _swiglu_kernel[(tokens, triton.cdiv(width, _TILE))](
            gate_up, out, width, gate_up.stride(0), BLOCK=_TILE, num_warps=_TILE_WARPS
        )
    return out


def swiglu_quantized(gate_up: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """gate_up [T, 2f] -> (swiglu in `dtype` [T, f], its scale [T])."""
    _check(gate_up)
    tokens, width = len(gate_up), gate_up.shape[1] // 2
    out = torch.empty(tokens, width, dtype=dtype, device=gate_up.device)
    scale = torch.empty(tokens, dtype=torch.float32, device=gate_up.device)
    if tokens:
        _swiglu_quantized_kernel[(tokens,)](
            gate_up,
            raw(out),
            scale,
            width,
            gate_up.stride(0),
            INT8=dtype is torch.int8,
            TILES=triton.cdiv(width, _QUANTIZED_TILE),
            BLOCK=_QUANTIZED_TILE,
            num_warps=_QUANTIZED_WARPS,
        )
    return out, scale


def _check(gate_up: torch.Tensor) -> None:
    if gate_up.ndim != 2 or not gate_up.shape[1] or gate_up.shape[1] % 2:
        raise ValueError(f"gate and up are the halves of [T, 2f], not of {tuple(gate_up.shape)}")
    if gate_up.stride(1) != 1:
        raise ValueError(f"values of a row must be adjacent; strides are {gate_up.stride()}")


def variants() -> Iterator[Variant]:
    """Plain for any width; quantised for MLPs of one tile and of many."""
    for kind in ("bf16", "fp16"):
        signature = {"gate_up": f"*{kind}", "out": f"*{kind}", "width": "i32", "stride": "i32"}
        yield Variant(
            name=f"swiglu {kind}",
            kernel=_swiglu_kernel,
            signature=signature,
            constexprs={"BLOCK": _TILE},
            num_warps=_TILE_WARPS,
            num_stages=3,
            aligned=("gate_up", "out", "width", "stride"),
        )
        for tiles in (1, 7):
            for stored in ("u8", "i8"):
                yield Variant(
                    name=f"swiglu {kind} {tiles * _QUANTIZED_TILE} to {stored}",
                    kernel=_swiglu_quantized_kernel,
                    signature={**signature, "out": f"*{stored}", "scale": "*fp32"},
                    constexprs={"INT8": stored == "i8", "TILES": tiles, "BLOCK": _QUANTIZED_TILE},
                    num_warps=_QUANTIZED_WARPS,
                    num_stages=3,
                    aligned=("gate_up", "out", "scale", "width", "stride"),
                )
