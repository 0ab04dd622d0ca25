"""How long a step takes: a roofline prior, corrected by every step that was timed.

    ms = base + f(n) + per_kv_token · Σ(c_i + q_i) + per_logit · n_logits + per_pair · Σ q_i·(c_i + q_i/2)

`f` is monotone and piecewise linear (cluster.load.StepCoefficients): a few tokens cost next to nothing
beside the weights' bytes, many cost their FLOPs, and the kernels' tiles make what lies between.

One such prediction sets the batch under a latency target (governor.py), the admission estimate, the
router's score and the autoscaler's capacity.
FLOPs and bytes are counted as in the roofline model (Williams, Waterman, Patterson 2009) for a
decoder-only transformer:

    n  new tokens        q_i, c_i  new and earlier tokens of sequence i      P  linear parameters
    L  layers            H  heads          hd  head dim                      d  hidden size
    V  vocabulary        f  MLP width      s  bytes a weight                 κ  KV bytes a token

    FLOPs = 2·P·n + 2·d·V·n_logits + Σ 4·L·H·hd·q_i·(c_i + q_i/2)
    bytes = s·P(n) + s·d·V + κ·Σ(c_i + q_i) + 2·n·L·(8·d + 3·f)

With k of E experts a token, P and f count k of them, and P(n) the E·(1 - (1 - k/E)^n) that n tokens go to
(were each choice as likely); else P(n) is P.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cluster.load import TOKEN_KNOTS, StepCoefficients
from serving.engine.least_squares import Floats, OnlineFit
from serving.engine.machine import Machine, Resource
from serving.engine.scheduled_step import ScheduledStep
from serving.model_spec import ModelSpec

KV_DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3": 1}


@dataclass(frozen=True, slots=True)
class StepShape:
    """The sizes of a step that its time depends on."""

    tokens: int  # n
    kv_tokens: int  # Σ(c_i + q_i)
    num_logits: int
    attention_pairs: float  # Σ q_i·(c_i + q_i/2): query-key pairs under the causal mask

    @classmethod
    def of(cls, step: ScheduledStep) -> StepShape:
        tokens = kv_tokens = num_logits = 0
        attention_pairs = 0.0
        for chunk in step.chunks:
            new_tokens = chunk.num_tokens
            tokens += new_tokens
            kv_tokens += chunk.start + new_tokens
            num_logits += chunk.wants_token
            attention_pairs += new_tokens * (chunk.start + new_tokens / 2)
        return cls(tokens, kv_tokens, num_logits, attention_pairs)


def step_flops(spec: ModelSpec, shape: StepShape) -> float:
    """Floating-point operations of a step; the formula is at the top of the file."""
    attention = 4 * spec.num_layers * spec.num_heads * spec.head_dim
    return (
        2.0 * spec.num_active_parameters * shape.tokens
        + 2.0 * spec.hidden_size * spec.vocab_size * shape.num_logits
        + attention * shape.attention_pairs
    )


def step_bytes(spec: ModelSpec, shape: StepShape, weight_bytes: float, kv_bytes: int) -> float:
    """Bytes a step moves to and from memory, at so many bytes a weight and a KV value."""
    weights = spec.num_touched_parameters(shape.tokens) + spec.hidden_size * spec.vocab_size
    per_layer_token = 8 * spec.hidden_size + 3 * spec.mlp_width
    return (
        weight_bytes * weights
        + float(spec.kv_bytes_per_token(kv_bytes)) * shape.kv_tokens
        + 2.0 * shape.tokens * spec.num_layers * per_layer_token
    )


def roofline_prior(spec: ModelSpec, machine: Machine, weight_bytes: float, kv_bytes: int) -> StepCoefficients:
    """Coefficients before any step was timed: weights and KV at memory speed, the rest at compute speed.

    The sum of both, which bounds the roofline's maximum of both from above, by at most a factor 2. What
    experts a few tokens go to costs those tokens; from the last knot on, all experts are read.
    """
    token_ms = 1e3 * step_flops(spec, StepShape(1, 0, 0, 0)) / machine.flops_per_s
    weights = step_bytes(spec, StepShape(0, 0, 0, 0), weight_bytes, kv_bytes)
    return StepCoefficients(
        base_ms=machine.step_overhead_ms + 1e3 * weights / machine.bytes_per_s,
        per_token_ms=token_ms,
        per_kv_token_ms=1e3 * spec.kv_bytes_per_token(kv_bytes) / machine.bytes_per_s,
        per_logit_ms=1e3 * step_flops(spec, StepShape(0, 0, 1, 0)) / machine.flops_per_s,
        per_pair_ms=1e3 * step_flops(spec, StepShape(0, 0, 0, 1)) / machine.flops_per_s,
        small_token_ms=tuple(
            token_ms + expert_ms for expert_ms in _expert_token_ms(spec, machine, weight_bytes)
        ),
    )


def _expert_token_ms(spec: ModelSpec, machine: Machine, weight_bytes: float) -> list[float]:
    """Between the knots, what reading further experts costs a token; zeros where there are none."""
    touched = [spec.num_touched_parameters(knot) for knot in (0, *TOKEN_KNOTS[:-1])]
    touched.append(spec.num_linear_parameters)
    value_ms = 1e3 * weight_bytes / machine.bytes_per_s
    return [
        value_ms * (upto - before) / (high - low)
        for before, upto, low, high in zip(touched, touched[1:], (0, *TOKEN_KNOTS), TOKEN_KNOTS, strict=False)
    ]


class StepTimeModel:
    """Predicts steps; begins as the roofline and learns from every one that was timed.

    The fit and its robustness are `least_squares.OnlineFit`'s. `bytes_per_weight` may change while it
    runs: an engine can be given other kernels, with other weights, between two steps.
    """

    def __init__(
        self,
        spec: ModelSpec,
        kv_dtype: str,
        machine: Machine | None = None,
        bytes_per_weight: float | None = None,
    ) -> None:
        """`kv_dtype` is the KV cache's; a weight has as many bytes as a KV value unless said otherwise."""
        self._spec = spec
        self._kv_bytes = KV_DTYPE_BYTES[kv_dtype]
        self.bytes_per_weight = float(self._kv_bytes) if bytes_per_weight is None else bytes_per_weight
        self.machine = machine or Machine()
        self._coefficients = roofline_prior(spec, self.machine, self.bytes_per_weight, self._kv_bytes)
        self._fit = OnlineFit(_vector(self._coefficients))

    @property
    def coefficients(self) -> StepCoefficients:
        """The present fit, all non-negative."""
        return self._coefficients

    @property
    def usual_error(self) -> float:
        """The median of the predictions' relative errors lately."""
        return self._fit.usual_error

    @property
    def num_observations(self) -> int:
        return self._fit.num_observations

    def predict_ms(self, shape: StepShape) -> float:
        return self._coefficients.predict_ms(
            shape.tokens, shape.kv_tokens, shape.num_logits, shape.attention_pairs
        )

    def observe(self, shape: StepShape, ms: float) -> None:
        """Learn that a step of this shape took `ms`, which must be above 0."""
        self._fit.observe(_features(shape), ms)
        base, token, kv, logit, pair, *small = self._fit.coefficients.tolist()
        self._coefficients = StepCoefficients(base, token, kv, logit, pair, tuple(small))

    def flops(self, shape: StepShape) -> float:
        return step_flops(self._spec, shape)

    def bytes_moved(self, shape: StepShape) -> float:
        return step_bytes(self._spec, shape, self.bytes_per_weight, self._kv_bytes)

    def arithmetic_intensity(self, shape: StepShape) -> float:
        """FLOP per byte; above the machine's ridge point a step is bound by compute."""
        return self.flops(shape) / self.bytes_moved(shape)

    def bound(self, shape: StepShape) -> Resource:
        """The resource that such a step waits for."""
        return self.machine.bound(self.flops(shape), self.bytes_moved(shape))


def _vector(prior: StepCoefficients) -> Floats:
    """[F], in the order of `_features`."""
    return np.array(
        [
            prior.base_ms,
            prior.per_token_ms,
            prior.per_kv_token_ms,
            prior.per_logit_ms,
            prior.per_pair_ms,
            *prior.small_token_ms,
        ]
    )


def _features(shape: StepShape) -> Floats:
    """[F]: what each coefficient is multiplied with."""
    low = (0, *TOKEN_KNOTS)
    small = [max(0, min(shape.tokens, high) - low[i]) for i, high in enumerate(TOKEN_KNOTS)]
    above = max(0, shape.tokens - TOKEN_KNOTS[-1])
    sizes = [1.0, above, shape.kv_tokens, shape.num_logits, shape.attention_pairs, *small]
    return np.array(sizes, dtype=np.float64)
