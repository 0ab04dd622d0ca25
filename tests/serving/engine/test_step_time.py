import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.engine.least_squares import OnlineFit, non_negative_solution
from serving.engine.machine import Machine
from serving.engine.step_time import StepShape, StepTimeModel, roofline_prior, step_bytes, step_flops
from serving.model_spec import Experts, ModelSpec
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

QWEN3_30B_A3B = msgspec.structs.replace(
    SMOLLM2,
    architecture="Qwen3MoeForCausalLM",
    num_layers=48,
    hidden_size=2048,
    num_heads=32,
    num_kv_heads=4,
    head_dim=128,
    intermediate_size=6144,
    experts=Experts(count=128, per_token=8, intermediate_size=768, renormalize=True),
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


def test_experts_count_where_they_are_multiplied_with_and_where_they_are_read():
    """Qwen3-30B-A3B has 29.9 G weights in its layers (its model card). A token is multiplied with 8 experts
    of 128; a step reads as many as random choices meet."""
    spec, experts = QWEN3_30B_A3B, QWEN3_30B_A3B.experts
    assert spec.num_linear_parameters == pytest.approx(29.9e9, rel=0.002)
    one_expert = 3 * spec.hidden_size * experts.intermediate_size
    idle = (128 - 8) * one_expert * spec.num_layers
    assert spec.num_active_parameters == spec.num_linear_parameters - idle
    assert step_flops(spec, StepShape(5, 0, 0, 0)) == 10 * spec.num_active_parameters
    assert spec.num_touched_parameters(1) == pytest.approx(spec.num_active_parameters)
    rng = np.random.default_rng(0)
    for tokens in (3, 16, 64):
        chosen = np.argsort(rng.random((300, tokens, 128)), axis=2)[:, :, :8].reshape(300, -1)
        met = np.mean([len(set(row)) for row in chosen.tolist()])
        touched = spec.num_touched_parameters(tokens) - spec.num_touched_parameters(0)
        assert touched == pytest.approx(met * one_expert * spec.num_layers, rel=0.02)


def test_dense_models_read_and_multiply_with_all_their_weights():
    """Whatever the step."""
    assert SMOLLM2.num_active_parameters == SMOLLM2.num_linear_parameters
    assert SMOLLM2.num_touched_parameters(0) == SMOLLM2.num_touched_parameters(9) == 30 * 3_538_944


def test_the_prior_of_experts_follows_what_a_batch_reads():
    """Small batches read few experts and cost less than large ones, as the roofline has it."""
    machine = Machine(flops_per_s=1e15, bytes_per_s=3e12, step_overhead_ms=0.0)
    prior = roofline_prior(QWEN3_30B_A3B, machine, weight_bytes=2, kv_bytes=2)
    for batch in (1, 4, 16, 40, 64, 256):
        shape = shape_of([(1, 100, 1)] * batch)
        floor_ms = 1e3 * step_bytes(QWEN3_30B_A3B, shape, 2, 2) / machine.bytes_per_s
        assert 0.85 * floor_ms < prior.decode_ms(batch, 100 * batch) < 1.3 * floor_ms, batch


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


def test_the_binding_resource_changes_at_the_ridge_point():
    """One stream waits for memory, a long prefill for compute; the floor is the slower of the two."""
    model = StepTimeModel(SMOLLM2, "bfloat16", Machine(flops_per_s=4e11, bytes_per_s=4e10))
    assert model.machine.ridge_flop_per_byte == 10.0
    one, prefill = shape_of([(1, 100, 1)]), shape_of([(512, 0, 1)])
    assert (model.bound(one), model.bound(prefill)) == ("memory", "compute")
    for shape in (one, prefill):
        flops, moved = model.flops(shape), model.bytes_moved(shape)
        assert model.machine.floor_ms(flops, moved) == pytest.approx(1e3 * max(flops / 4e11, moved / 4e10))


def test_the_prior_is_within_twice_the_roofline():
    """At every shape the prior lies between the roofline's maximum and its double."""
    machine = Machine(flops_per_s=1e12, bytes_per_s=1e11, step_overhead_ms=0.0)
    prior = roofline_prior(SMOLLM2, machine, weight_bytes=2, kv_bytes=2)
    for sequences in ([(1, 100, 1)], [(1, 2000, 1)] * 16, [(256, 0, 1)], [(64, 64, 0)] * 8):
        shape = shape_of(sequences)
        floor_ms = machine.floor_ms(step_flops(SMOLLM2, shape), step_bytes(SMOLLM2, shape, 2, 2))
        predicted = prior.predict_ms(shape.tokens, shape.kv_tokens, shape.num_logits, shape.attention_pairs)
        assert 0.9 * floor_ms < predicted < 2 * floor_ms  # activations have no coefficient


def mixed_steps(rng, count):
    """Steps as a server sees them: decodes of many widths, some with prefill chunks."""
    for _ in range(count):
        batch = int(rng.integers(1, 64))
        decodes = [(1, int(rng.integers(10, 2000)), 1) for _ in range(batch)]
        prefills = [(int(rng.integers(1, 256)), 0, 1) for _ in range(int(rng.integers(0, 3)))]
        yield shape_of(decodes + prefills)


def law(shape):
    """A machine of ours: memory binds below 24 tokens, compute above; attention and logits besides."""
    gemm = max(6.0, 0.25 * shape.tokens)
    return 1.0 + gemm + 2e-4 * shape.kv_tokens + 0.1 * shape.num_logits + 1e-5 * shape.attention_pairs


def errors_after(model, rng, warm_up, time_of, count=200):
    for shape in mixed_steps(rng, warm_up):
        model.observe(shape, time_of(shape))
    return np.array([abs(model.predict_ms(s) / law(s) - 1) for s in mixed_steps(rng, count)])


@pytest.mark.parametrize("machine_is_off_by", [0.01, 1.0, 100.0])
def test_it_learns_a_machine_from_timed_steps(machine_is_off_by):
    """However wrong the prior, after 200 steps with 5 % noise: median error 5 %, 95 of 100 below 15 %."""
    model = StepTimeModel(
        SMOLLM2, "bfloat16", Machine(1e11 * machine_is_off_by, 2e10 * machine_is_off_by, 1.0)
    )
    rng = np.random.default_rng(7)
    errors = errors_after(model, rng, 200, lambda shape: law(shape) * rng.normal(1, 0.05))
    assert np.median(errors) < 0.05 and np.quantile(errors, 0.95) < 0.15


def test_a_bend_in_the_cost_of_tokens_is_learnt():
    """One straight line through a batch's tokens cannot tell both 1 and 64; the knots can."""
    model = StepTimeModel(SMOLLM2, "bfloat16")
    rng = np.random.default_rng(7)
    errors_after(model, rng, 600, law)
    for batch in (1, 4, 16, 64):
        shape = shape_of([(1, 200, 1)] * batch)
        assert model.predict_ms(shape) == pytest.approx(law(shape), rel=0.06)


def test_interrupted_steps_do_not_move_it():
    """One step in fifteen that takes five times as long leaves the others' predictions within 6 %."""
    rng = np.random.default_rng(7)

    def interrupted(shape):
        return law(shape) * rng.normal(1, 0.02) * (5.0 if rng.random() < 1 / 15 else 1.0)

    errors = errors_after(StepTimeModel(SMOLLM2, "bfloat16"), rng, 400, interrupted)
    assert np.median(errors) < 0.06


def test_it_follows_a_machine_that_slows_down():
    """Thirty steps after the machine became half as fast, most of the error is gone; after 300, all."""
    model = StepTimeModel(SMOLLM2, "bfloat16")
    rng = np.random.default_rng(7)
    errors_after(model, rng, 500, law)
    for steps, most in ((30, 0.15), (270, 0.04)):
        for shape in mixed_steps(rng, steps):
            model.observe(shape, 2 * law(shape))
        errors = [abs(model.predict_ms(s) / (2 * law(s)) - 1) for s in mixed_steps(rng, 100)]
        assert np.median(errors) < most


def test_one_shape_alone_is_learnt_without_drift():
    """A lone sequence fixes one sum of the coefficients; what it says nothing of stays near the prior."""
    model = StepTimeModel(SMOLLM2, "bfloat16")
    before = model.coefficients
    one = shape_of([(1, 50, 1)])
    for _ in range(3000):
        model.observe(one, 40.0)
    assert model.predict_ms(one) == pytest.approx(40.0, rel=0.01)
    assert model.coefficients.per_token_ms == pytest.approx(before.per_token_ms, rel=0.2)
    assert model.usual_error < 0.01


def test_the_cost_of_prefill_survives_a_long_time_without_any():
    """Twenty memories of one decode shape later, a prefill is still predicted as it was last seen."""
    model = StepTimeModel(SMOLLM2, "bfloat16", Machine(1e9, 1e9, 1.0))
    rng = np.random.default_rng(7)
    errors_after(model, rng, 400, law)
    decodes, prefill = shape_of([(1, 1000, 1)] * 4), shape_of([(400, 0, 1)])
    for _ in range(4000):
        model.observe(decodes, law(decodes) * rng.normal(1, 0.05))
    assert model.predict_ms(prefill) == pytest.approx(law(prefill), rel=0.15)


STEPS = st.lists(
    st.tuples(
        st.integers(1, 4096), st.integers(1, 10**6), st.integers(0, 512), st.floats(0, 1e9),
        st.floats(1e-3, 1e5),
    ),
    min_size=1, max_size=30,
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(STEPS)
def test_no_timing_makes_a_prediction_negative(steps):
    """Coefficients stay finite and non-negative whatever the clock says, so predictions do, and grow."""
    model = StepTimeModel(SMOLLM2, "float32")
    for *sizes, ms in steps:
        model.observe(StepShape(*sizes), ms)
        fitted = model.coefficients
        *linear, small = msgspec.structs.astuple(fitted)
        values = np.array([*linear, *small])
        assert np.isfinite(values).all() and (values >= 0).all()
        assert np.isfinite(model.usual_error)


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 9), st.booleans())
def test_the_fit_is_the_constrained_minimum(seed, size, is_guessed):
    """Karush, Kuhn and Tucker: on the bound the gradient points outward, off it there is none."""
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(size, size))
    matrix, vector = root @ root.T + 0.1 * np.eye(size), rng.normal(size=size)
    guess = rng.random(size) < 0.5 if is_guessed else np.ones(size, dtype=bool)
    solution = non_negative_solution(matrix, vector, guess)
    gradient = matrix @ solution - vector
    assert (solution >= 0).all() and (gradient > -1e-8).all()
    assert np.abs(solution * gradient).max() < 1e-8


def test_the_usual_error_is_that_of_the_observations():
    """Targets with 10 % normal noise: the tracked median error is near 0.67 standard deviations."""
    rng = np.random.default_rng(7)
    fit = OnlineFit(np.ones(2))
    tracked = []
    for _ in range(1500):
        features = np.array([1.0, rng.uniform(0, 10)])
        fit.observe(features, float(features @ [3.0, 2.0]) * rng.normal(1, 0.1))
        tracked.append(fit.usual_error)
    assert np.mean(tracked[500:]) == pytest.approx(0.0675, rel=0.3)
