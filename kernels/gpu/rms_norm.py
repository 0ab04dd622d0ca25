"""RMSNorm of whole rows in registers: one read, one write. Formulas in `kernels.rms_norm`.

A row's sum is taken in an order that depends on its width alone, so a row's result does not depend on
the batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from kernels.gpu.row_quantization import quantize, raw, row_scale
from kernels.gpu.variants import Variant

MAX_WIDTH = 32_768
_MAX_REGISTERS = 64  # what the widest program's 32 warps can have


@dataclass(frozen=True)
class Config:
    """Rows a program, and the warps that hold them: at most 32 float32 a thread."""

    rows: int
    num_warps: int


def configure(width: int) -> Config:
    """For rows of `width` (a power of two) values."""
    return Config(rows=max(1, 1024 // width), num_warps=min(32, max(4, width // 512)))


@triton.jit(do_not_specialize=["num_tokens"])  # it changes from step to step
def _rms_norm_kernel(
    x,  # [T, d]
    residual,  # [T, d], read and overwritten where ADD
    weight,  # [d]
    out,  # [T, d]
    scale,  # float32 [T], written where QUANTIZE
    num_tokens,
    width,
    x_stride,
    residual_stride,
    eps,
    ADD: tl.constexpr,
    QUANTIZE: tl.constexpr,
    INT8: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at = tl.arange(0, BLOCK)
    mask = (row < num_tokens)[:, None] & (at < width)[None, :]
    rows = row.to(tl.int64)[:, None]
    values = tl.load(x + rows * x_stride + at[None, :], mask=mask, other=0.0)
    if ADD:
        places = residual + rows * residual_stride + at[None, :]
        total = values.to(tl.float32) + tl.load(places, mask=mask, other=0.0).to(tl.float32)
        values = total.to(residual.dtype.element_ty)  # what is normed is the sum that is kept
        tl.store(places, values, mask=mask)
    wide = values.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(wide * wide, axis=1) / width + eps)
    weights = tl.load(weight + at, mask=at < width, other=0.0).to(tl.float32)
    normed = wide * inverse[:, None] * weights[None, :]
    places = out + rows * width + at[None, :]
    if QUANTIZE:
        step = row_scale(normed, INT8)
        tl.store(scale + row, step, mask=row < num_tokens)
        tl.store(places, quantize(normed, step, INT8), mask=mask)
    else:
        tl.store(places, normed.to(out.dtype.element_ty), mask=mask)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [T, d], weight [d] -> [T, d]."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(x, None, weight, eps, out, None)
    return out


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rms_norm(x + residual), x + residual), the sum in `residual`'s memory."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(x, residual, weight, eps, out, None)
    return out, residual


def rms_norm_quantized(
    x: torch.Tensor, weight: torch.Tensor, eps: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rms_norm(x) in `dtype`, its scale [T])."""
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    scale = torch.empty(len(x), dtype=torch.float32, device=x.device)
    _launch(x, None, weight, eps, out, scale)
    return out, scale


def add_rms_norm_quantized(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(rms_norm(x + residual) in `dtype`, its scale [T], x + residual in `residual`'s memory)."""
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    scale = torch.empty(len(x), dtype=torch.float32, device=x.device)
    _launch(x, residual, weight, eps, out, scale)
    return out, scale, residual


def _launch(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    out: torch.Tensor,
    scale: torch.Tensor | None,
) -> None:
    _check(x, residual, weight)
    tokens, width = x.shape
    if not tokens:
        return
    block = triton.next_power_of_2(width)
    config = configure(block)
    _rms_norm_kernel[(triton.cdiv(tokens, config.rows),)](
        x,
        x if residual is None else residual,
        weight,
        out if scale is None else raw(out),
        x if scale is None else scale,
        tokens,
        width,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        eps,
        ADD=residual is not None,
        QUANTIZE=scale is not None,
        INT8=out.dtype is torch.int8,
        ROWS=config.rows,
        BLOCK=block,
        num_warps=config.num_warps,
        maxnreg=_MAX_REGISTERS,
    )


def _check(x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor) -> None:
    if x.ndim != 2 or weight.shape != x.shape[1:] or not 0 < x.shape[1] <= MAX_WIDTH:
        raise ValueError(
            f"x {tuple(x.shape)} must be [T, d] of weight {tuple(weight.shape)}, d <= {MAX_WIDTH}"
        )
    if x.stride(1) != 1 or weight.stride(0) != 1:
        raise ValueError(f"values of a row must be adjacent; strides are {x.stride()}, {weight.stride()}")
    if residual is None:
        return
    if residual.shape != x.shape or residual.dtype != x.dtype or residual.stride(1) != 1:
        raise ValueError(f"residual {tuple(residual.shape)}, {residual.dtype} must be like x, rows adjacent")


def variants() -> Iterator[Variant]:
    """Widths of a tiny model, of 8B's and of the largest; alone and fused, plain and quantised."""
    for block in (1024, 4096, 8192, MAX_WIDTH):
        for kind in ("bf16", "fp16"):
            for add in (False, True):
                for stored in (kind, "u8", "i8"):
                    yield _variant(block, kind, add, stored)


def _variant(block: int, kind: str, add: bool, stored: str) -> Variant:
    config = configure(block)
    return Variant(
        name=f"{'add_' if add else ''}rms_norm {kind} {block}" + (f" to {stored}" if stored != kind else ""),
        kernel=_rms_norm_kernel,
        signature={
            **dict.fromkeys(("x", "residual", "weight"), f"*{kind}"),
            "out": f"*{stored}",
            "scale": "*fp32",
            **dict.fromkeys(("num_tokens", "width", "x_stride", "residual_stride"), "i32"),
            "eps": "fp32",
        },
        constexprs={
            "ADD": add,
            "QUANTIZE": stored != kind,
            "INT8": stored == "i8",
            "ROWS": config.rows,
            "BLOCK": block,
        },
        num_warps=config.num_warps,
        num_stages=3,
        aligned=("x", "residual", "weight", "out", "scale", "width", "x_stride", "residual_stride"),
        max_registers=_MAX_REGISTERS,
    )
