"""Quantised linear layers: the quantisers' laws, and the GPU's kernels against float64."""

import pytest
import torch

from kernels.dispatch import forced
from kernels.gpu import quantized_linear as subject
from kernels.quantized_linear import (
    GROUP,
    dequantize_fp8,
    dequantize_int4,
    dequantize_int8,
    fp8_linear,
    fp8_linear_reference,
    fp8_product,
    int4_linear,
    int8_linear,
    linear_reference,
    pack_int4,
    quantize_fp8,
    quantize_int4,
    quantize_int8,
    unpack_int4,
)
from kernels.row_quantization import quantize_rows

CUDA = torch.cuda.is_available()
# The interpreter's bfloat16 is wrong by design.
DTYPES = [torch.float16, torch.bfloat16] if CUDA else [torch.float16]
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
# (M, K, N): tiles that nothing fills, splits; and a last step that is not full, which W4A16 has not
SHAPES = [(1, 256, 64), (5, 1024, 100), (33, 1280, 33), (64, 1024, 130)]
TAILS = [(3, 144, 48), (3, 1008, 48)]
FORMATS = {
    "int8": (quantize_int8, int8_linear, dequantize_int8),
    "int4": (quantize_int4, int4_linear, dequantize_int4),
}


def operands(shape, dtype, device):
    """x with rows of very different size, and a weight whose rows and groups are too."""
    rows, inputs, outputs = shape
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, inputs, generator=generator) * torch.logspace(-1, 1, rows)[:, None]
    weight = torch.randn(outputs, inputs, generator=generator) * torch.logspace(-2, 0, outputs)[:, None]
    weight[:, : inputs // 2] *= 3
    return x.to(dtype).to(device), weight.to(dtype).to(device)


def close(actual, expected):
    """Each row to its own size: a small row must be right too."""
    tolerance = TOLERANCE[actual.dtype]
    size = expected.abs().amax(dim=1, keepdim=True)
    torch.testing.assert_close(actual.double() / size, expected / size, rtol=tolerance, atol=tolerance)


def test_four_bits_survive_packing():
    """Every byte of two values, in every place of a group, is taken apart as it was put together."""
    values = torch.arange(3 * 2 * GROUP).reshape(3, -1).mul_(7).remainder_(16).to(torch.uint8)
    packed = pack_int4(values)
    assert packed.shape == (3, GROUP)
    assert torch.equal(unpack_int4(packed), values)
    # Value j and value j + 64 share byte j.
    assert packed[0, 5] == values[0, 5] | values[0, 5 + GROUP // 2] << 4


def test_int8_is_off_by_at_most_half_a_step():
    """Of a scale that is the row's largest over 127; a row of zeros stays zeros."""
    _, weight = operands((1, 256, 40), torch.float32, "cpu")
    weight[3] = 0
    quantized = quantize_int8(weight)
    error = (dequantize_int8(quantized, torch.float64) - weight.double()).abs()
    assert (error <= quantized.scale.double()[:, None] * 0.5001).all()
    torch.testing.assert_close(quantized.scale[7], weight[7].abs().max() / 127)
    assert dequantize_int8(quantized, torch.float32)[3].eq(0).all()


def test_int4_is_off_by_at_most_a_step():
    """Of a scale that is a group's span over 15; a group that is all of one sign has its zero at the end."""
    _, weight = operands((1, 4 * GROUP, 40), torch.float32, "cpu")
    weight[1] = weight[1].abs() + 1
    weight[2] = -weight[2].abs()
    weight[3] = 0
    quantized = quantize_int4(weight)
    step = quantized.scale.T.repeat_interleave(GROUP, dim=1)
    assert ((dequantize_int4(quantized, torch.float32) - weight).abs() <= step * 1.001).all()
    assert quantized.zero[:, 1].eq(0).all() and quantized.zero[:, 2].eq(15).all()
    assert dequantize_int4(quantized, torch.float32)[3].eq(0).all()
    with pytest.raises(ValueError, match="multiples of 128"):
        quantize_int4(torch.zeros(4, 100))


def test_e4m3_has_four_bits_of_precision():
    """Relative to each value, down to the subnormals; the row's largest is 448."""
    _, weight = operands((1, 256, 40), torch.float32, "cpu")
    quantized = quantize_fp8(weight)
    error = (dequantize_fp8(quantized, torch.float64) - weight.double()).abs()
    smallest = 2**-10 * quantized.scale.double()[:, None]
    assert (error <= weight.double().abs() * 2**-4 * 1.0001 + smallest).all()
    assert quantized.data.float().abs().amax(dim=1).eq(448).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "name,shape", [(name, shape) for name in FORMATS for shape in SHAPES + TAILS * (name == "int8")]
)
def test_a_narrow_weight_gives_the_product_of_its_values(name, shape, dtype, device):
    """W8A16 and W4A16: as dequantised in float64, whatever does not fill a tile, in splits and whole."""
    quantize, linear, dequantize = FORMATS[name]
    x, dense = operands(shape, dtype, device)
    weight = quantize(dense)
    expected = linear_reference(x, dequantize(weight, torch.float64))
    close(linear(x, weight), expected)
    with forced("triton"):
        close(linear(x, weight), expected)
    assert weight.arrivals.eq(0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES + TAILS)
def test_an_fp8_product_is_that_of_its_values(shape, dtype, device):
    """e4m3 operands and their scales in float64."""
    x, dense = operands(shape, dtype, device)
    weight = quantize_fp8(dense)
    rows, scale = quantize_rows(x, torch.float8_e4m3fn)
    expected = fp8_linear_reference(x, weight)
    close(fp8_product(rows, scale, weight, dtype), expected)
    with forced("triton"):
        close(fp8_product(rows, scale, weight, dtype), expected)


@pytest.mark.parametrize("rows,inputs", [(1, 16), (3, 300), (7, 1024)])
def test_rows_are_quantised_as_by_torch(rows, inputs, device):
    """To the bit; a row of zeros stays zeros, a broken row is broken."""
    x = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(0)).half().to(device)
    x[0] = 0 if rows > 1 else x[0]
    actual, scale = subject.quantize_rows(x)
    expected, expected_scale = quantize_rows(x, torch.float8_e4m3fn)
    assert torch.equal(scale, expected_scale)
    assert torch.equal(actual.float(), expected.float())
    x[-1, inputs // 2] = float("nan")
    assert subject.quantize_rows(x)[1].isnan().nonzero().tolist() == [[rows - 1]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_fp8_linear_quantises_and_multiplies(dtype, device):
    """Both launches together."""
    x, dense = operands((5, 1024, 100), dtype, device)
    weight = quantize_fp8(dense)
    with forced("triton"):
        close(fp8_linear(x, weight), fp8_linear_reference(x, weight))


@pytest.mark.parametrize("name", FORMATS)
def test_a_row_does_not_depend_on_the_batch(name, device):
    """To the bit: the cut of the sum is by the weight's shape alone."""
    quantize, linear, _ = FORMATS[name]
    x, dense = operands((33, 1024, 48), torch.float16, device)
    weight = quantize(dense)
    with forced("triton"):
        whole = linear(x, weight)
        assert torch.equal(linear(x[:1], weight), whole[:1])
        assert torch.equal(linear(x[4:24].contiguous(), weight), whole[4:24])


@pytest.mark.parametrize("rows", [subject.MAX_ROWS + 1, subject.PIECEWISE_ROWS + 1])
def test_many_rows_go_in_pieces_or_to_the_library(rows, device):
    """Beyond MAX_ROWS in pieces, beyond PIECEWISE_ROWS on the widened weight, with the same result."""
    x, dense = operands((rows, 128, 16), torch.float16, device)
    for quantize, linear, dequantize in FORMATS.values():
        weight = quantize(dense)
        with forced("triton"):
            close(linear(x, weight), linear_reference(x, dequantize(weight, torch.float64)))


def test_splits_fill_the_gpu_and_divide_the_inputs():
    """Every step belongs to exactly one split, and a split is long enough to be pipelined."""
    for outputs, inputs in [(64, 256), (4096, 4096), (4096, 14336), (28672, 4096), (960, 576), (576, 1536)]:
        steps, splits = subject.cut(outputs, inputs, subject.Config())
        assert steps * splits == -(-inputs // 128)
        assert splits == 1 or steps >= 4
    assert subject.cut(28672, 4096, subject.Config()) == (32, 1)
    assert subject.cut(4096, 4096, subject.Config()) == (4, 8)


def test_magic_numbers_count_by_one():
    """A value 0..15 in the last bits of MAGIC is MAGIC plus that value, in both dtypes."""
    for dtype, bits in subject.MAGIC.items():
        floats = (torch.arange(16, dtype=torch.int16) | bits).view(dtype).float()
        assert torch.equal(floats, floats[0] + torch.arange(16))


def test_what_a_kernel_cannot_read_is_refused(device):
    """A wrong dtype, width or stride is an error, not a wrong product."""
    x, dense = operands((4, 256, 32), torch.float16, device)
    weight = quantize_int8(dense)
    for wrong, why in [(x.float(), "must be"), (x[:, :128], "inputs"), (x.T.contiguous().T, "contiguous")]:
        with forced("triton"), pytest.raises(ValueError, match=why):
            int8_linear(wrong, weight)
