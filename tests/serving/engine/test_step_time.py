import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.engine.step_time import (
    Machine,
    StepShape,
    StepTimeModel,
    _non_negative_solution,
    roofline_prior,
    step_bytes,
    step_flops,
)
from serving.model_spec import ModelSpec
from tests.serving.engine.harness import Harness, request

SMOLLM2 = ModelSpec(
    architecture="LlamaForCausalLM",
    num_layers=30,
    hidden_size=576,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    intermediate_size=1536,
    vocab_size=49152,
    context_tokens=8192,
    rope_theta=1e5,
    rope_scaling=None,
    rms_norm_eps=1e-5,
    tie_word_embeddings=True,
    bos_token_id=1,
    eos_token_ids=(2,),
)


def count_flops(spec, sequences):
    """Multiply-adds of every matrix product of a forward pass, one query at a time, times two."""
    mul_adds = 0
    for new_tokens, cached_tokens, wants_token in sequences:
        for query in range(new_tokens):
            qkv_width = (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim
            mul_adds += spec.num_layers * (
                spec.hidden_size * qkv_width
                + spec.num_heads * spec.head_dim * spec.hidden_size
                + 3 * spec.hidden_size * spec.intermediate_size
                + 2 * spec.num_heads * spec.head_dim * (cached_tokens + query + 1)  # q·k and p·v
            )
        mul_adds += wants_token * spec.hidden_size * spec.vocab_size
    return 2 * mul_adds


def shape_of(sequences):
    return StepShape(
        tokens=sum(new for new, _, _ in sequences),
        kv_tokens=sum(new + cached for new, cached, _ in sequences),
        num_logits=sum(wants for _, _, wants in sequences),
        attention_pairs=sum(new * (cached + new / 2) for new, cached, _ in sequences),
    )


@pytest.mark.parametrize(
    "sequences",
    [[(1, 0, 1)], [(1, 900, 1), (1, 17, 1)], [(512, 0, 0)], [(64, 448, 1), (1, 3000, 1)]],
)
def test_flops_are_those_of_every_matrix_product(sequences):
    """The closed form equals a count query by query, but for half a key a query."""
    flops = step_flops(SMOLLM2, shape_of(sequences))
    half_keys = 2 * SMOLLM2.num_layers * SMOLLM2.num_heads * SMOLLM2.head_dim * shape_of(sequences).tokens
    assert flops + half_keys == count_flops(SMOLLM2, sequences)


def test_bytes_are_weights_once_and_each_context_token_once():
    """SmolLM2 in bfloat16: 134.5 M weights; 22.5 KiB of KV a token; ten times the batch, weights once."""
    empty = StepShape(tokens=0, kv_tokens=0, num_logits=0, attention_pairs=0)
    weights = step_bytes(SMOLLM2, empty, weight_bytes=2, kv_bytes=2)
    assert weights == pytest.approx(269e6, rel=0.01)
    with_kv = StepShape(tokens=0, kv_tokens=1000, num_logits=0, attention_pairs=0)
    assert step_bytes(SMOLLM2, with_kv, weight_bytes=2, kv_bytes=2) - weights == 1000 * 22.5 * 1024
    assert step_bytes(SMOLLM2, with_kv, weight_bytes=0.5, kv_bytes=2) < weights


def test_a_shape_is_read_off_a_scheduled_step():
    """One decode of six context tokens beside a prefill of seven."""
    harness = Harness(num_blocks=32, max_step_tokens=8)
    harness.submit(request("a", (1, 2, 3, 4, 5)))
    harness.step()
    harness.submit(request("b", tuple(range(20, 30))))
    shape = StepShape.of(harness.begin())
    assert shape == StepShape(tokens=8, kv_tokens=13, num_logits=1, attention_pairs=5.5 + 24.5)


def test_arithmetic_intensity_grows_with_the_batch_and_falls_with_context():
    """Weights are read once a step for all; each context is read for its own sequence alone."""
    model = StepTimeModel(SMOLLM2, "bfloat16")
    one, many = (shape_of([(1, 100, 1)] * batch) for batch in (1, 32))
    long = shape_of([(1, 8000, 1)] * 32)
    assert model.arithmetic_intensity(one) == pytest.approx(1.0, rel=0.1)  # 2 FLOP a 2-byte weight
    assert model.arithmetic_intensity(many) > 10 * model.arithmetic_intensity(one)
    assert model.arithmetic_intensity(long) < model.arithmetic_intensity(many) / 2


def test_the_prior_is_within_twice_the_roofline():
    """At every shape the linear prior lies between the roofline's maximum and its double."""
    machine = Machine(flops_per_s=1e12, bytes_per_s=1e11, step_overhead_ms=0.0)
    prior = roofline_prior(SMOLLM2, machine, weight_bytes=2, kv_bytes=2)
    for sequences in ([(1, 100, 1)], [(1, 2000, 1)] * 16, [(256, 0, 1)], [(64, 64, 0)] * 8):
        shape = shape_of(sequences)
        compute_ms = 1e3 * step_flops(SMOLLM2, shape) / machine.flops_per_s
        memory_ms = 1e3 * step_bytes(SMOLLM2, shape, 2, 2) / machine.bytes_per_s
        predicted = prior.predict_ms(shape.tokens, shape.kv_tokens)
        # Logits, attention and activations, a tenth or so here, have no coefficient of their own.
        assert 0.7 * max(compute_ms, memory_ms) < predicted < 2 * max(compute_ms, memory_ms)


def mixed_steps(rng, count):
    """Sizes as a server sees them: decodes of many widths, some with a prefill chunk."""
    for _ in range(count):
        batch = int(rng.integers(1, 64))
        prefill = int(rng.integers(0, 512)) * int(rng.integers(0, 2))
        yield batch + prefill, batch * int(rng.integers(10, 2000)) + prefill


@pytest.mark.parametrize("machine_is_off_by", [0.01, 1.0, 100.0])
def test_it_recovers_the_machine_from_timed_steps(machine_is_off_by):
    """However wrong the prior, 300 steps with 5 % noise give every coefficient within 5 %."""
    true = np.array([3.0, 0.05, 2e-4])
    machine = Machine(1e11 * machine_is_off_by, 2e10 * machine_is_off_by, 1.0)
    model = StepTimeModel(SMOLLM2, "bfloat16", machine)
    rng = np.random.default_rng(7)
    for tokens, kv_tokens in mixed_steps(rng, 300):
        ms = true @ [1, tokens, kv_tokens] * rng.normal(1, 0.05)
        model.observe(tokens, kv_tokens, ms)
    fitted = model.coefficients
    assert [fitted.base_ms, fitted.per_token_ms, fitted.per_kv_token_ms] == pytest.approx(true, rel=0.05)


def test_it_follows_a_machine_that_slows_down():
    """Old steps are forgotten: after five times its memory it predicts the new speed within 3 %."""
    model = StepTimeModel(SMOLLM2, "bfloat16")
    rng = np.random.default_rng(7)
    for slowdown in (1.0, 2.0):
        for tokens, kv_tokens in mixed_steps(rng, 1000):
            model.observe(tokens, kv_tokens, slowdown * (3 + 0.05 * tokens + 2e-4 * kv_tokens))
    assert model.predict_ms(100, 10_000) == pytest.approx(2 * 10.0, rel=0.03)


def test_one_shape_alone_is_learnt_without_drift():
    """A lone sequence fixes one sum of the coefficients; what it says nothing of stays near the prior."""
    model = StepTimeModel(SMOLLM2, "bfloat16")
    before = model.coefficients
    for _ in range(3000):
        model.observe(1, 50, 40.0)
    assert model.predict_ms(1, 50) == pytest.approx(40.0, rel=0.01)
    assert model.coefficients.per_kv_token_ms == pytest.approx(before.per_kv_token_ms, rel=0.2)


def test_the_cost_of_prefill_survives_a_long_time_without_any():
    """Twenty memories of one decode shape later, a prefill is still predicted as it was last seen."""
    model = StepTimeModel(SMOLLM2, "bfloat16", Machine(1e9, 1e9, 1.0))
    rng = np.random.default_rng(7)
    for tokens, kv_tokens in mixed_steps(rng, 400):
        model.observe(tokens, kv_tokens, 3 + 0.05 * tokens + 2e-4 * kv_tokens)
    for _ in range(4000):
        model.observe(4, 4000, (3 + 0.05 * 4 + 2e-4 * 4000) * rng.normal(1, 0.05))
    assert model.predict_ms(512, 512) == pytest.approx(3 + 0.05 * 512 + 2e-4 * 512, rel=0.1)


STEPS = st.lists(
    st.tuples(st.integers(1, 4096), st.integers(1, 10**6), st.floats(1e-3, 1e5)), min_size=1, max_size=30
)


@settings(max_examples=80, deadline=None)
@given(STEPS)
def test_no_timing_makes_a_prediction_negative(steps):
    """Coefficients stay finite and non-negative whatever the clock says, so predictions do."""
    model = StepTimeModel(SMOLLM2, "float32")
    for tokens, kv_tokens, ms in steps:
        model.observe(tokens, kv_tokens, ms)
        fitted = model.coefficients
        values = np.array([fitted.base_ms, fitted.per_token_ms, fitted.per_kv_token_ms])
        assert np.isfinite(values).all() and (values >= 0).all()


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 2**32))
def test_the_fit_is_the_constrained_minimum(seed):
    """Karush, Kuhn and Tucker: on the bound the gradient points outward, off it there is none."""
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(3, 3))
    matrix, vector = root @ root.T + 0.1 * np.eye(3), rng.normal(size=3)
    solution = _non_negative_solution(matrix, vector)
    gradient = matrix @ solution - vector
    assert (solution >= 0).all() and (gradient > -1e-9).all()
    assert np.abs(solution * gradient).max() < 1e-9
