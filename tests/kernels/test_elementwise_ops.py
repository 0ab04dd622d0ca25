"""Norms, gates, rotations and products against their formulas."""

import math

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from kernels.dispatch import choose, forced
from kernels.linear import linear, pack_weight
from kernels.rms_norm import add_rms_norm, rms_norm, rms_norm_reference
from kernels.rope import (
    apply_rope,
    apply_rope_reference,
    rope_frequencies,
    rope_table,
    scale_linear,
    scale_llama3,
)
from kernels.swiglu import swiglu, swiglu_reference

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}
ODD_SHAPES = [(1, 2), (3, 64), (5, 90), (17, 576)]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", ODD_SHAPES)
def test_rms_norm_is_its_formula(shape, dtype):
    """x / rms(x) * weight, at any width and dtype."""
    torch.manual_seed(0)
    x, weight = torch.randn(shape).to(dtype) * 7, torch.rand(shape[1]).to(dtype)
    torch.testing.assert_close(
        rms_norm(x, weight, 1e-5),
        rms_norm_reference(x, weight, 1e-5),
        rtol=TOLERANCE[dtype],
        atol=TOLERANCE[dtype],
    )


def test_add_rms_norm_also_returns_the_sum():
    """The residual stream grows by x, and what is normed is the sum."""
    torch.manual_seed(0)
    x, residual, weight = torch.randn(5, 90), torch.randn(5, 90), torch.rand(90)
    total = x + residual
    normed, stream = add_rms_norm(x, residual.clone(), weight, 1e-5)
    torch.testing.assert_close(stream, total)
    torch.testing.assert_close(normed, rms_norm_reference(total, weight, 1e-5))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", ODD_SHAPES)
def test_swiglu_is_its_formula(shape, dtype):
    """silu(gate) * up, gate in the first half."""
    torch.manual_seed(0)
    gate_up = torch.randn(shape).to(dtype) * 3
    tolerance = 2 * TOLERANCE[dtype]  # silu and the product are each rounded
    torch.testing.assert_close(swiglu(gate_up), swiglu_reference(gate_up), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("heads,head_dim", [(1, 2), (3, 6), (12, 64)])
def test_rope_is_a_complex_rotation(heads, head_dim, dtype):
    """Each pair (i, i + D/2) turns by position times frequency, also far into the context."""
    torch.manual_seed(0)
    x = torch.randn(4, heads, head_dim).to(dtype)
    positions, frequencies = torch.tensor([0, 1, 77, 8191]), rope_frequencies(head_dim, 100_000.0)
    # An angle near 8191 has 2**-11 of float32's relative precision left.
    tolerance = max(TOLERANCE[dtype], 2e-3)
    torch.testing.assert_close(
        apply_rope(x, *rope_table(positions, frequencies)),
        apply_rope_reference(x, positions, frequencies),
        rtol=tolerance,
        atol=tolerance,
    )


def test_rope_equals_transformers():
    """The half-rotation layout is the one Llama checkpoints are trained with."""
    torch.manual_seed(0)
    x, positions, frequencies = torch.randn(6, 3, 64), torch.arange(6) * 11, rope_frequencies(64, 10_000.0)
    angles = (positions[:, None] * frequencies).repeat(1, 2)[None]
    theirs, _ = apply_rotary_pos_emb(
        x.transpose(0, 1)[None], x.transpose(0, 1)[None], angles.cos(), angles.sin()
    )
    torch.testing.assert_close(
        apply_rope(x, *rope_table(positions, frequencies)), theirs[0].transpose(0, 1), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("head_dim", [64, 128])
def test_scaled_frequencies_equal_transformers(head_dim):
    """Linear and llama3 scaling give transformers' frequencies, at every wavelength."""
    llama3 = dict(
        rope_type="llama3",
        rope_theta=500_000.0,
        factor=32.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    )
    linear_ = dict(rope_type="linear", rope_theta=500_000.0, factor=3.0)
    ours = rope_frequencies(head_dim, 500_000.0)
    scaled = scale_llama3(
        ours, factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context_tokens=8192
    )
    for parameters, frequencies in ((llama3, scaled), (linear_, scale_linear(ours, 3.0))):
        config = LlamaConfig(
            hidden_size=head_dim, num_attention_heads=1, head_dim=head_dim, rope_parameters=parameters
        )
        theirs, _ = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, torch.device("cpu"))
        torch.testing.assert_close(frequencies, theirs, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows,inputs,outputs", [(0, 8, 8), (1, 7, 5), (3, 576, 192), (33, 90, 1)])
def test_packed_linear_is_a_matrix_product(rows, inputs, outputs, dtype):
    """Packing changes the layout, not the product, for row counts it was not packed for too."""
    torch.manual_seed(0)
    x, weight = torch.randn(rows, inputs).to(dtype), torch.randn(outputs, inputs).to(dtype)
    packed = pack_weight(weight)
    tolerance = TOLERANCE[dtype] * math.sqrt(inputs)
    torch.testing.assert_close(
        linear(x, packed), (x.double() @ weight.double().T).to(dtype), rtol=TOLERANCE[dtype], atol=tolerance
    )
    assert packed.nbytes == inputs * outputs * dtype.itemsize


def test_dispatch_takes_the_kernel_only_where_it_is():
    """Torch is the path on CPU and for ops without a kernel; a test can force either."""
    x = torch.zeros(1)
    assert choose(x, abs, "math:floor") is abs
    assert choose(x, abs) is abs
    with forced("triton"):
        assert choose(x, abs, "math:floor") is math.floor
        assert choose(x, abs) is abs
        with forced("torch"):
            assert choose(x, abs, "math:floor") is abs
    assert choose(x, abs, "math:floor") is abs


def test_dispatch_imports_a_kernel_when_it_is_first_used():
    """Naming a kernel loads nothing: a machine without a GPU never imports a compiler."""
    x = torch.zeros(1)
    assert choose(x, abs, "no_such_module:op") is abs
    with forced("triton"), pytest.raises(ModuleNotFoundError, match="no_such_module"):
        choose(x, abs, "no_such_module:op")
