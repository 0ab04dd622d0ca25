"""The Triton norms, gates, rotations and cache writes against their formulas; interpreted without a GPU."""

import pytest
import torch

from kernels.dispatch import forced
from kernels.rms_norm import (
    add_rms_norm,
    add_rms_norm_quantized,
    rms_norm,
    rms_norm_quantized,
    rms_norm_reference,
)
from kernels.rope import rope_frequencies, rope_table
from kernels.rope_kv import QkNorm, rope_and_write_kv, rope_kv_reference
from kernels.row_quantization import LARGEST, quantize_rows
from kernels.swiglu import swiglu, swiglu_quantized, swiglu_reference

TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3}
# Rows that do not fill a program, widths that are no power of two, one value, several rows a program.
SHAPES = [(1, 1), (3, 90), (17, 64), (5, 576), (2, 1030), (1, 5000)]
EIGHT_BITS = list(LARGEST)


@pytest.fixture(autouse=True)
def triton_path():
    with forced("triton"):
        yield


def random(*shape, dtype=torch.float32, device="cpu", seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


def check(ours, reference, dtype, factor=1.0):
    tolerance = factor * TOLERANCE[dtype]
    torch.testing.assert_close(ours, reference, rtol=tolerance, atol=tolerance)


def within_a_step(quantized, scale, reference):
    """`quantized * scale` is `reference` to half a step of the format, and its scale is the largest's."""
    wide, step = quantized.float(), scale[:, None]
    torch.testing.assert_close(
        scale,
        (reference.abs().amax(dim=1) / LARGEST[quantized.dtype]).clamp_min(1e-12).float(),
        rtol=1e-5,
        atol=0,
    )
    # Half of int8's unit; of e4m3's, 1/16 of the value or half a subnormal.
    unit = 0.5 if quantized.dtype is torch.int8 else (wide.abs() / 16).clamp_min(2.0**-10)
    assert ((wide * step - reference).abs() <= 1.001 * unit * step + 1e-12).all()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm_is_its_formula(shape, dtype, device):
    """x / rms(x) * weight at any width, also where rows lie apart."""
    x = random(shape[0], shape[1] + 3, dtype=dtype, device=device)[:, : shape[1]] * 7
    weight = random(shape[1], dtype=dtype, device=device, seed=1)
    check(rms_norm(x, weight, 1e-5), rms_norm_reference(x, weight, 1e-5), dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
def test_add_rms_norm_is_a_sum_and_its_norm(shape, dtype, device):
    """The residual is overwritten by the rounded sum, and that sum is what is normed."""
    x, residual = (random(*shape, dtype=dtype, device=device, seed=seed) for seed in (0, 1))
    weight = random(shape[1], dtype=dtype, device=device, seed=2)
    total = x + residual
    normed, stream = add_rms_norm(x, residual, weight, 1e-5)
    assert stream.equal(total) and residual.equal(total)
    check(normed, rms_norm_reference(total, weight, 1e-5), dtype)


@pytest.mark.parametrize("dtype", EIGHT_BITS)
@pytest.mark.parametrize("shape", [(3, 90), (17, 64), (2, 1030)])
def test_quantised_norms_are_the_norm_to_half_a_step(shape, dtype, device):
    """Alone and fused, and each row by its own largest value: rows differ by factors of ten."""
    x = random(*shape, device=device)
    weight = random(shape[1], device=device, seed=2)
    weight[: shape[1] // 2] *= 1e-3  # e4m3's subnormals
    residual = random(*shape, device=device, seed=1) * 10.0 ** -torch.arange(shape[0], device=device)[:, None]
    total = x + residual
    within_a_step(*rms_norm_quantized(x, weight, 1e-5, dtype), rms_norm_reference(x, weight, 1e-5))
    rows, scale, stream = add_rms_norm_quantized(x, residual, weight, 1e-5, dtype)
    assert stream.equal(total)
    within_a_step(rows, scale, rms_norm_reference(total, weight, 1e-5))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(1, 2), (3, 180), (5, 2 * 1024), (2, 2 * 2500)])
def test_swiglu_is_its_formula(shape, dtype, device):
    """silu(gate) * up in tiles, also of a projection that is part of a wider one."""
    gate_up = random(shape[0], shape[1] + 5, dtype=dtype, device=device)[:, : shape[1]] * 3
    check(swiglu(gate_up), swiglu_reference(gate_up), dtype, factor=2)


@pytest.mark.parametrize("dtype", EIGHT_BITS)
@pytest.mark.parametrize("shape", [(3, 180), (2, 2 * 4096), (2, 2 * 9000)])
def test_quantised_swiglu_is_swiglu_to_half_a_step(shape, dtype, device):
    """Rows of part of a tile, of one tile and of several share one scale."""
    gate_up = random(*shape, device=device) * 3
    within_a_step(*swiglu_quantized(gate_up, dtype), swiglu_reference(gate_up))


def test_large_gates_do_not_overflow(device):
    """silu(-200) is 0 and silu(200) is 200, not NaN."""
    gate_up = torch.tensor([[-200.0, 200.0, 3.0, 3.0]], device=device)
    assert swiglu(gate_up).tolist() == [[-0.0, 600.0]]


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", EIGHT_BITS)
def test_a_broken_row_stays_broken_and_alone(dtype, broken, device):
    """int8 has no NaN, so the row's scale carries it; other rows of the program keep theirs."""
    x = random(3, 90, device=device)
    x[1, 40] = broken
    wide = torch.cat((x, x), dim=1)
    for _, scale in (
        rms_norm_quantized(x, torch.ones(90, device=device), 1e-5, dtype),
        swiglu_quantized(wide, dtype),
        quantize_rows(x, dtype),
    ):
        assert scale.isfinite().tolist()[::2] == [True, True]
    assert rms_norm_quantized(x, torch.ones(90, device=device), 1e-5, dtype)[1].isnan().tolist() == [
        False,
        True,
        False,
    ]
    assert rms_norm(x, torch.ones(90, device=device), 1e-5).isfinite().all(dim=1).tolist() == [
        True,
        False,
        True,
    ]


def test_e4m3_rounds_as_torch_does(device):
    """Every e4m3 number, every tie between two, their neighbours, subnormals, zeros and NaN."""
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()  # all that are positive
    middles = (codes[1:] + codes[:-1]) / 2
    values = torch.cat((codes, middles, middles * (1 + 2**-22), middles * (1 - 2**-22)))
    values = torch.cat((values, -values)).to(device)
    heads = torch.zeros(1, 3, len(values), device=device)
    heads[0, 2] = values
    table = torch.zeros(1, 1, len(values), device=device)
    cache = torch.zeros(2, 1, 1, 16, len(values), device=device).to(torch.float8_e4m3fn)
    slot = torch.zeros(1, dtype=torch.int32, device=device)
    rope_and_write_kv(heads, 1, table, table, cache, slot)
    stored = cache[1, 0, 0, 0].view(torch.uint8)
    assert stored.equal(values.to(torch.float8_e4m3fn).view(torch.uint8))


class Fused:
    """A projection's heads, tables, and a cache full of NaN with a slot for each token."""

    def __init__(self, device, dtype, heads, kv_heads, head_dim, stored=None, tokens=5, block_tokens=16):
        self.shape = (heads, kv_heads)
        self.heads = random(tokens, heads + 2 * kv_heads, head_dim, dtype=dtype, device=device)
        self.positions = torch.tensor([0, 1, 77, 4095, 8191], device=device)[:tokens]
        self.frequencies = rope_frequencies(head_dim, 100_000.0).to(device)
        cache = torch.full((2, 4, kv_heads, block_tokens, head_dim), float("nan"), dtype=dtype, device=device)
        self.cache = cache.to(stored or dtype)
        self.slots = torch.tensor([63, 0, 17, 16, 40], dtype=torch.int32, device=device)[:tokens]
        self.norm = QkNorm(*(random(head_dim, dtype=dtype, device=device, seed=s) for s in (3, 4)), eps=1e-6)

    def run(self, norm=None, **scales):
        table = rope_table(self.positions, self.frequencies)
        return rope_and_write_kv(
            self.heads, self.shape[0], *table, self.cache, self.slots, norm=norm, **scales
        )

    def reference(self, norm=None):
        return rope_kv_reference(self.heads, *self.shape, self.positions, self.frequencies, norm)

    def kept(self):
        """Keys and values [T, K, D] read back from the slots."""
        block, offset = self.slots.long() // 16, self.slots.long() % 16
        return (part.float()[block, :, offset] for part in self.cache)


# An angle near 8191 has 2**-11 of float32's relative precision left.
ROTATED = {torch.float32: 2e-3, torch.float16: 3e-3}


@pytest.mark.parametrize("dtype", ROTATED)
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(
    "heads,kv_heads,head_dim", [(1, 1, 2), (9, 3, 64), (4, 4, 80), (6, 2, 96), (8, 1, 128), (3, 3, 256)]
)
def test_rope_and_write_is_its_formula(heads, kv_heads, head_dim, normed, dtype, device):
    """Queries come out, keys and values lie at their slots, and no other slot is touched."""
    step = Fused(device, dtype, heads, kv_heads, head_dim)
    norm = step.norm if normed else None
    query, key, value = step.reference(norm)
    queries = step.run(norm)
    close = {"rtol": ROTATED[dtype], "atol": ROTATED[dtype] * (4 if normed else 1)}
    torch.testing.assert_close(queries.double(), query, **close)
    keys, values = step.kept()
    torch.testing.assert_close(keys.double(), key, **close)
    assert values.double().equal(value), "values are copied"
    assert (~step.cache.isnan()).sum() == 2 * len(step.slots) * kv_heads * head_dim


@pytest.mark.parametrize("head_dim", [64, 96])
def test_an_e4m3_cache_holds_scaled_keys_and_values(head_dim, device):
    """What is read back times its scale is the key or value to half a step; what is too large saturates."""
    step = Fused(device, torch.float16, 4, 2, head_dim, stored=torch.float8_e4m3fn)
    step.heads[0, 7] = 60_000.0
    _, key, value = step.reference()
    step.run(key_scale=0.01, value_scale=0.5)
    for kept, exact, scale in zip(step.kept(), (key, value), (0.01, 0.5), strict=True):
        wanted = (exact / scale).clamp(-448, 448)
        unit = (kept.abs() / 16).clamp_min(2.0**-10)
        assert ((kept - wanted).abs() <= unit * 1.001 + 2e-3 / scale).all()
    _, values = step.kept()
    assert (values[0, 1] == 448).all()


def test_heads_need_not_be_contiguous(device):
    """Heads that are a part of a wider projection give what their copy gives."""
    step = Fused(device, torch.float32, 4, 2, 16)
    expected, cache = step.run(), step.cache.clone()
    wide = torch.full((5, 11, 24), float("nan"), device=device)
    wide[:, 2:10, :16] = step.heads
    step.heads = wide[:, 2:10, :16]
    assert step.run().equal(expected)
    assert step.cache.nan_to_num(7).equal(cache.nan_to_num(7))


def test_a_negative_slot_keeps_nothing(device):
    """A padding token has queries, but writes nowhere."""
    step = Fused(device, torch.float32, 4, 2, 16)
    step.slots[:] = -1
    assert step.run().isfinite().all() and step.cache.isnan().all()


def test_no_tokens_launch_nothing(device):
    """A step may be empty."""
    step = Fused(device, torch.float32, 4, 2, 16, tokens=0)
    assert step.run().shape == (0, 4, 16)
    empty = torch.empty(0, 8, device=device)
    assert rms_norm(empty, torch.ones(8, device=device), 1e-5).shape == (0, 8)
    assert swiglu(empty).shape == (0, 4)


def test_what_a_kernel_cannot_take_is_refused(device):
    """Wrong strides, dtypes and shapes raise, instead of reading other memory."""
    x, weight = torch.zeros(4, 8, device=device), torch.ones(8, device=device)
    step = Fused(device, torch.float32, 4, 2, 16)
    table = rope_table(step.positions, step.frequencies)
    for refused in (
        lambda: rms_norm(x.T.contiguous().T, weight, 1e-5),
        lambda: rms_norm(x, weight[:4], 1e-5),
        lambda: add_rms_norm(x, x.half(), weight, 1e-5),
        lambda: swiglu(x[:, :7]),
        lambda: rope_and_write_kv(step.heads, 3, *table, step.cache, step.slots),
        lambda: rope_and_write_kv(step.heads, 4, *table, step.cache, step.slots.long()),
        lambda: rope_and_write_kv(step.heads, 4, *table, step.cache.half(), step.slots),
        lambda: rope_and_write_kv(step.heads, 4, table[0].half(), table[1], step.cache, step.slots),
    ):
        with pytest.raises(ValueError):
            refused()
    with pytest.raises(KeyError):
        swiglu_quantized(x, torch.uint8)
