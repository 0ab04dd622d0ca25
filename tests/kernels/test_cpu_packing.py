"""Packed weights against the matrices they stand for, and their products against the formula."""

import numpy as np
import pytest
import torch

from kernels.cpu.library import Model, Workspace
from kernels.cpu.packing import GROUP, Arena, GroupQuantized, pack, quantize_groups, stack
from kernels.rms_norm import rms_norm_reference
from tests.kernels.native_cases import built, needs_library, rounded

FORMATS = ("bf16", "q8", "q4")
PRODUCTS = [("bf16", "bf16"), ("q8", "bf16"), ("q4", "bf16"), ("q8", "int8"), ("q4", "int8")]


def random_weight(n: int, k: int, kind: str) -> torch.Tensor | GroupQuantized:
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(n + k))
    if kind == "bf16":
        return weight.bfloat16()
    if kind == "q8":
        return quantize_groups(weight)
    random = np.random.default_rng(n * k)
    scales, minima = (random.normal(size=(n, k // GROUP)).astype(np.float16) for _ in range(2))
    return GroupQuantized(random.integers(0, 16, (n, k), dtype=np.uint8), scales, minima)


def as_float(weight: torch.Tensor | GroupQuantized) -> torch.Tensor:
    return weight.float() if isinstance(weight, torch.Tensor) else weight.dequantize()


def test_eight_bits_are_the_nearest():
    """No value is further from its weight than half a step of its group's scale, zeros stay zero."""
    weight = torch.randn(48, 96)
    weight[5, 32:64] = 0
    weight[6] *= 1e-3
    quantized = quantize_groups(weight)
    step = torch.from_numpy(quantized.scales.astype(np.float32)).repeat_interleave(GROUP, dim=1)
    error = (quantized.dequantize() - weight).abs()
    assert (error <= step * 0.51 + weight.abs() * 2**-11).all()
    assert (quantized.dequantize()[5, 32:64] == 0).all()


def test_stacking_unlike_formats_keeps_the_values():
    """Q4 beside Q8 becomes Q8 within half a step; like formats are only joined."""
    q4, q8 = random_weight(32, 64, "q4"), random_weight(16, 64, "q8")
    both = stack([q4, q8])
    assert both.minima is None and both.values.shape == (48, 64)
    step = both.scales.astype(np.float32).repeat(GROUP, axis=1)
    expected = torch.cat([as_float(q4), as_float(q8)])
    assert ((both.dequantize() - expected).abs().numpy() <= step * 0.51 + 2e-3).all()
    assert np.array_equal(stack([q4, q4]).values, np.concatenate([q4.values, q4.values]))


def test_columns_are_whole_groups():
    """A rank's inputs are cut with their scales."""
    weight = random_weight(16, 96, "q4")
    assert weight.columns(slice(32, 96)).dequantize().equal(as_float(weight)[:, 32:])


def test_arena_arrays_do_not_overlap():
    """Small and large arrays, zeroed, aligned, each its own memory."""
    arena = Arena()
    arrays = [arena.take((size,), np.uint8) for size in (1, 63, 64, 65, 70 << 20, 3)]
    for index, array in enumerate(arrays):
        assert array.ctypes.data % 64 == 0 and not array[:100].any()
        array[:] = index + 1
    assert all((array == index + 1).all() for index, array in enumerate(arrays))


@needs_library
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize(("n", "k"), [(32, 32), (96, 160), (131, 64)])
def test_rows_read_back_what_was_packed(kind, n, k):
    """Packing loses nothing; a number of outputs that is no multiple of 32 is padded."""
    library, weight = built(), random_weight(n, k, kind)
    packed = pack(weight, Arena(), library)
    ids = np.arange(n, dtype=np.int32)[::-1].copy()
    out = torch.empty(n, k)
    library.searoom_rows(packed.struct, ids.ctypes.data, n, 2, out.data_ptr())
    torch.testing.assert_close(out, as_float(weight).flip(0), rtol=1e-6, atol=1e-6)


@needs_library
@pytest.mark.parametrize(("kind", "precision"), PRODUCTS)
@pytest.mark.parametrize("rows", [*range(1, 27), 49, 121, 250])
def test_a_product_of_normed_rows_is_the_formula(kind, precision, rows):
    """Every height of a register tile: logits = rms_norm(x) W^T, activations rounded as the format says."""
    library, (n, k) = built(), (96, 160)
    weight = random_weight(n, k, kind)
    packed = pack(weight, Arena(), library)
    torch.manual_seed(rows)
    x, norm = torch.randn(rows, k) * 3, torch.rand(k) + 0.5
    model = Model(hidden=k, threads=2, is_int8=precision == "int8", eps=1e-5)
    out = torch.full((rows, n), float("nan"))
    workspace = Workspace(library)
    library.searoom_head(
        model, workspace.handle, packed.struct, norm.data_ptr(), x.data_ptr(), rows, out.data_ptr()
    )
    expected = rounded(rms_norm_reference(x, norm, 1e-5), precision) @ as_float(weight).T
    # A value on the border between two roundings may fall to either side.
    assert (out - expected).abs().max() < 0.02 * expected.std()
    assert (out - expected).abs().mean() < 1e-3 * expected.std()


@needs_library
@pytest.mark.parametrize(("kind", "precision"), PRODUCTS)
@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_broken_row_stays_broken_and_alone(kind, precision, broken):
    """A NaN must not be rounded to a number, nor reach the other rows."""
    library, (n, k) = built(), (32, 64)
    packed = pack(random_weight(n, k, kind), Arena(), library)
    x = torch.randn(5, k)
    x[3, 40] = broken
    out = torch.empty(5, n)
    workspace = Workspace(library)
    model = Model(hidden=k, threads=1, is_int8=precision == "int8", eps=1e-5)
    norm = torch.ones(k)
    library.searoom_head(
        model, workspace.handle, packed.struct, norm.data_ptr(), x.data_ptr(), 5, out.data_ptr()
    )
    is_finite = out.isfinite().all(dim=1).tolist()
    assert is_finite == [True, True, True, False, True]
