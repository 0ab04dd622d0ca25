"""Quantised linear layers at an 8B model's shapes; the peer is the dense bfloat16 product of cuBLAS."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from kernels.bench.case import Case, Peer, Place, nbytes
from kernels.quantized_linear import (
    Int4Weight,
    Int8Weight,
    dequantize_int4,
    dequantize_int8,
    fp8_linear,
    fp8_linear_reference,
    int4_linear,
    int8_linear,
    linear_reference,
    quantize_fp8,
    quantize_int4,
    quantize_int8,
)

# (in, out): the attention's output, gate and up, down
_WEIGHTS = ((4096, 4096), (4096, 28672), (14336, 4096))
_ROWS = (1, 16, 64)


def cases(place: Place) -> Iterator[Case]:
    """W8A16, W4A16 and FP8 for a few rows."""
    weights, rows = (((256, 48),), (3,)) if place.tiny else (_WEIGHTS, _ROWS)
    for inputs, outputs in weights:
        dense = place.randn(outputs, inputs) / inputs**0.5
        for tokens in rows:
            x = place.randn(tokens, inputs, seed=1)
            yield _int8(x, dense)
            yield _int4(x, dense)
            if place.tiny or torch.cuda.get_device_capability() >= (8, 9):
                yield _fp8(x, dense)


def _int8(x: torch.Tensor, dense: torch.Tensor) -> Case:
    weight = quantize_int8(dense)
    return _case(
        "W8A16",
        x,
        dense,
        run=lambda: int8_linear(x, weight),
        expected=lambda: linear_reference(x, dequantize_int8(weight, torch.float64)),
        weight_bytes=_weight_bytes(weight),
    )


def _int4(x: torch.Tensor, dense: torch.Tensor) -> Case:
    weight = quantize_int4(dense)
    return _case(
        "W4A16",
        x,
        dense,
        run=lambda: int4_linear(x, weight),
        expected=lambda: linear_reference(x, dequantize_int4(weight, torch.float64)),
        weight_bytes=_weight_bytes(weight) + nbytes(weight.zero),
    )


def _fp8(x: torch.Tensor, dense: torch.Tensor) -> Case:
    weight = quantize_fp8(dense)
    rows, scale = torch.ones_like(x, dtype=torch.float8_e4m3fn), torch.ones(len(x), 1, device=x.device)

    def scaled() -> torch.Tensor:
        columns = weight.scale[None, :]
        return torch._scaled_mm(rows, weight.data.T, scale_a=scale, scale_b=columns, out_dtype=torch.bfloat16)

    return _case(
        "FP8",
        x,
        dense,
        run=lambda: fp8_linear(x, weight),
        expected=lambda: fp8_linear_reference(x, weight),
        weight_bytes=nbytes(weight.data, weight.scale),
        peers=(Peer("cuBLASLt fp8, no quantising", scaled, cpu=False),),
    )


def _weight_bytes(weight: Int8Weight | Int4Weight) -> int:
    return nbytes(weight.data, weight.scale)


def _case(
    kind: str,
    x: torch.Tensor,
    dense: torch.Tensor,
    *,
    run: Callable[[], torch.Tensor],
    expected: Callable[[], torch.Tensor],
    weight_bytes: int,
    peers: tuple[Peer, ...] = (),
) -> Case:
    outputs, inputs = dense.shape
    return Case(
        shape=f"{kind} M={len(x)} {inputs}→{outputs}",
        run=run,
        expected=expected,
        moved_bytes=weight_bytes + nbytes(x) + len(x) * outputs * x.element_size(),
        flops=2 * len(x) * dense.numel(),
        bound="memory",
        tolerance=1e-2,
        peers=(Peer("cuBLAS bf16", lambda: F.linear(x, dense)), *peers),
    )
