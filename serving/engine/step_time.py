"""How long a step takes: a roofline prior, corrected by every step that was timed.

    ms = base + per_token · tokens + per_kv_token · kv_tokens           (cluster.load.StepCoefficients)

One such prediction sets the admission estimate, the router's score and the autoscaler's capacity.
FLOPs and bytes are counted as in the roofline model (Williams, Waterman, Patterson 2009) for a
decoder-only transformer:

    n  new tokens        q_i, c_i  new and earlier tokens of sequence i      P  linear parameters
    L  layers            H  heads          hd  head dim                      d  hidden size
    V  vocabulary        f  MLP width      s  bytes a weight                 κ  KV bytes a token

    FLOPs = 2·P·n + 2·d·V·n_logits + Σ 4·L·H·hd·q_i·(c_i + q_i/2)
    bytes = s·P + s·d·V + κ·Σ(c_i + q_i) + 2·n·L·(8·d + 3·f)
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cluster.load import StepCoefficients
from serving.engine.scheduled_step import ScheduledStep
from serving.model_spec import ModelSpec

Floats = NDArray[np.floating[Any]]

KV_DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class Machine:
    """What a replica's ranks can do together. The default is two laptop cores."""

    flops_per_s: float = 1e11
    bytes_per_s: float = 2e10
    step_overhead_ms: float = 1.0


@dataclass(frozen=True, slots=True)
class StepShape:
    """The sizes of a step that its time depends on."""

    tokens: int  # n
    kv_tokens: int  # Σ(c_i + q_i)
    num_logits: int
    attention_pairs: float  # Σ q_i·(c_i + q_i/2): query-key pairs under the causal mask

    @classmethod
    def of(cls, step: ScheduledStep) -> StepShape:
        return cls(
            tokens=sum(chunk.num_tokens for chunk in step.chunks),
            kv_tokens=sum(chunk.end for chunk in step.chunks),
            num_logits=sum(chunk.wants_token for chunk in step.chunks),
            attention_pairs=sum(
                chunk.num_tokens * (chunk.start + chunk.num_tokens / 2) for chunk in step.chunks
            ),
        )


def step_flops(spec: ModelSpec, shape: StepShape) -> float:
    """Floating-point operations of a step; the formula is at the top of the file."""
    attention = 4 * spec.num_layers * spec.num_heads * spec.head_dim
    return (
        2.0 * spec.num_linear_parameters * shape.tokens
        + 2.0 * spec.hidden_size * spec.vocab_size * shape.num_logits
        + attention * shape.attention_pairs
    )


def step_bytes(spec: ModelSpec, shape: StepShape, weight_bytes: float, kv_bytes: int) -> float:
    """Bytes a step moves to and from memory, at so many bytes a weight and a KV value."""
    weights = spec.num_linear_parameters + spec.hidden_size * spec.vocab_size
    per_layer_token = 8 * spec.hidden_size + 3 * spec.intermediate_size
    return (
        weight_bytes * weights
        + float(spec.kv_bytes_per_token(kv_bytes)) * shape.kv_tokens
        + 2.0 * shape.tokens * spec.num_layers * per_layer_token
    )


def roofline_prior(spec: ModelSpec, machine: Machine, weight_bytes: float, kv_bytes: int) -> StepCoefficients:
    """Coefficients before any step was timed: weights and KV at memory speed, tokens at compute speed.

    The sum of both, which bounds the roofline's maximum of both from above, by at most a factor 2.
    """
    empty = StepShape(tokens=0, kv_tokens=0, num_logits=0, attention_pairs=0)
    one_token = StepShape(tokens=1, kv_tokens=0, num_logits=0, attention_pairs=0)
    kv_s = spec.kv_bytes_per_token(kv_bytes) / machine.bytes_per_s
    return StepCoefficients(
        base_ms=machine.step_overhead_ms
        + 1e3 * step_bytes(spec, empty, weight_bytes, kv_bytes) / machine.bytes_per_s,
        per_token_ms=1e3 * step_flops(spec, one_token) / machine.flops_per_s,
        per_kv_token_ms=1e3 * kv_s,
    )


class StepTimeModel:
    """Least squares over the relative errors of past steps, older ones forgotten exponentially.

    Recursive in information form: `A = Σ λ^age x·xᵀ` and `b = Σ λ^age x` with `x = features / ms`, so
    that `θ = argmin Σ λ^age (θ·x - 1)²` costs the same at every step. A weak pull towards the fit before
    (at first the roofline's) keeps a direction that the workload does not excite where it was last
    known: after an hour without prefill its cost is neither forgotten nor free to drift. Coefficients
    are kept non-negative.
    """

    FORGETTING = 0.995  # a memory of about 200 steps
    PULL = 1e-6  # towards the fit before, as a part of all that the steps say; also bounds the condition

    def __init__(
        self,
        spec: ModelSpec,
        kv_dtype: str,
        machine: Machine | None = None,
        weight_bytes: float | None = None,
    ) -> None:
        """`kv_dtype` is the KV cache's, `weight_bytes` a weight's size where it differs from that."""
        self._spec = spec
        self._kv_bytes = KV_DTYPE_BYTES[kv_dtype]
        self._weight_bytes = float(self._kv_bytes) if weight_bytes is None else weight_bytes
        prior = roofline_prior(spec, machine or Machine(), self._weight_bytes, self._kv_bytes)
        self._coefficients = prior
        self._prior = np.array([prior.base_ms, prior.per_token_ms, prior.per_kv_token_ms])
        # In units of the prior θ is around 1, which keeps the 3 × 3 system well conditioned.
        self._scaled: Floats = np.ones(3)
        self._information = np.zeros((3, 3))
        self._moment = np.zeros(3)

    @property
    def coefficients(self) -> StepCoefficients:
        """The present fit, all non-negative."""
        return self._coefficients

    def predict_ms(self, tokens: int, kv_tokens: int) -> float:
        return self._coefficients.predict_ms(tokens, kv_tokens)

    def observe(self, tokens: int, kv_tokens: int, ms: float) -> None:
        """Learn that a step of these sizes took `ms`, which must be above 0."""
        assert ms > 0
        row = np.array([1.0, tokens, kv_tokens]) * self._prior / ms
        self._information = self.FORGETTING * self._information + np.outer(row, row)
        self._moment = self.FORGETTING * self._moment + row
        pull = self.PULL * float(np.trace(self._information))
        self._scaled = _non_negative_solution(
            self._information + pull * np.eye(3), self._moment + pull * self._scaled
        )
        base_ms, per_token_ms, per_kv_token_ms = (self._scaled * self._prior).tolist()
        self._coefficients = StepCoefficients(base_ms, per_token_ms, per_kv_token_ms)

    def flops(self, shape: StepShape) -> float:
        return step_flops(self._spec, shape)

    def bytes_moved(self, shape: StepShape) -> float:
        return step_bytes(self._spec, shape, self._weight_bytes, self._kv_bytes)

    def arithmetic_intensity(self, shape: StepShape) -> float:
        """FLOP per byte; above the machine's ridge point a step is bound by compute."""
        return self.flops(shape) / self.bytes_moved(shape)


def _non_negative_solution(matrix: Floats, vector: Floats) -> Floats:
    """The minimum of `½ θᵀ·matrix·θ - vector·θ` over θ ≥ 0; `matrix` [3, 3] is positive definite.

    Nearly always the free solution. Else one of the faces holds it: with three unknowns all are tried.
    """
    free: Floats = np.linalg.solve(matrix, vector)
    if (free >= 0).all():
        return free
    best, best_value = np.zeros(3), 0.0
    for size in (1, 2):
        for face in combinations(range(3), size):
            index = list(face)
            part = np.linalg.solve(matrix[np.ix_(index, index)], vector[index])
            value = -0.5 * float(part @ vector[index])
            if (part >= 0).all() and value < best_value:
                best = np.zeros(3)
                best[index] = part
                best_value = value
    return best
