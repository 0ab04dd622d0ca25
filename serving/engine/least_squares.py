"""An online fit of non-negative coefficients that outliers do not move, and forgets what is long past."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]


class OnlineFit:
    """`target ≈ features · θ` with θ ≥ 0, by least squares over relative errors.

    Recursive in information form: `A = Σ λ^age w x·xᵀ` and `b = Σ λ^age w x` with `x = features / target`,
    so that `θ = argmin Σ λ^age w (θ·x - 1)²` costs the same at every observation. `w` is Huber's weight:
    errors beyond three times the usual one count for their sign more than for their size, so a step that
    the operating system interrupted does not move the fit.

    A weak pull towards the fit before (at first the prior) keeps a direction that the observations do
    not excite where it was last known: it is neither forgotten nor free to drift.

    A machine shared with others changes its speed within seconds, for all steps alike, and much faster
    than eight coefficients can be learnt anew. So one factor over all of them, the pace, follows the last
    few errors, and the fit learns targets with the pace taken out. It returns to 1 by itself, so that what
    lasts becomes the fit's.
    """

    FORGETTING = 0.995  # a memory of about 200 observations
    PULL = 1e-6  # towards the fit before, as a part of all that was observed; also bounds the condition
    OUTLIER = 3.0  # times the usual error
    _ERROR_RATE = 0.05  # how fast the usual error is learnt, as a part of itself an observation
    _LEAST_ERROR = 0.003
    _PACE_RATE = 0.2
    _PACE_RETURN = 0.99
    _PACE_STEP = 0.2  # errors beyond this count no more

    def __init__(self, prior: Floats) -> None:
        """`prior` [F], all above 0, is the first guess; features are measured in its units."""
        self._prior = prior
        self._scaled: Floats = np.ones(len(prior))  # θ in units of the prior: around 1, well conditioned
        self._information = np.zeros((len(prior), len(prior)))
        self._moment = np.zeros(len(prior))
        self._log_pace = 0.0
        self.usual_error = 0.5  # the median of |prediction / target - 1|, as it is tracked
        self.num_observations = 0

    @property
    def coefficients(self) -> Floats:
        """At the present pace."""
        return self._scaled * self._prior * math.exp(self._log_pace)

    def observe(self, features: Floats, target: float) -> None:
        """Learn that `features` [F] gave `target`, which must be above 0."""
        assert target > 0
        pace = math.exp(self._log_pace)
        row = features * self._prior * (pace / target)
        ratio = float(row @ self._scaled)
        error = abs(ratio - 1)
        weight = min(1.0, self.OUTLIER * self.usual_error / max(error, 1e-12))
        learnt = self.usual_error * math.exp(self._ERROR_RATE * math.copysign(1, error - self.usual_error))
        self.usual_error = min(max(learnt, self._LEAST_ERROR), 1.0)
        self._information = self.FORGETTING * self._information + weight * np.outer(row, row)
        self._moment = self.FORGETTING * self._moment + weight * row
        pull = self.PULL * float(np.trace(self._information))
        self._scaled = non_negative_solution(
            self._information + pull * np.eye(len(row)), self._moment + pull * self._scaled, self._scaled > 0
        )
        slower = min(max(1 / ratio - 1, -self._PACE_STEP), self._PACE_STEP) if ratio > 0 else 0.0
        self._log_pace = self._PACE_RETURN * self._log_pace + self._PACE_RATE * slower
        self.num_observations += 1


def non_negative_solution(matrix: Floats, vector: Floats, guess: NDArray[np.bool_]) -> Floats:
    """The minimum of `½ θᵀ·matrix·θ - vector·θ` over θ ≥ 0; `matrix` [F, F] is positive definite.

    The active-set method of Lawson and Hanson (1974), started from a guess of which θ are above 0:
    nearly always one solution of the equations is enough.
    """
    passive = guess.copy()
    solution = _solve_on(matrix, vector, passive)
    if (solution < 0).any():  # the guess is infeasible: start where nothing is
        passive[:] = False
        solution = np.zeros(len(vector))
    tolerance = 1e-10 * (float(np.abs(vector).max()) + 1e-300)
    for _ in range(10 * len(vector)):
        gain = np.where(passive, -np.inf, vector - matrix @ solution)
        best = int(gain.argmax())
        if gain[best] <= tolerance:
            break
        passive[best] = True
        candidate = _solve_on(matrix, vector, passive)
        while (candidate[passive] <= 0).any():
            falling = passive & (candidate <= 0)
            step = (solution[falling] / np.maximum(solution[falling] - candidate[falling], 1e-300)).min()
            solution = solution + step * (candidate - solution)
            passive &= solution > 1e-14
            solution[~passive] = 0.0
            candidate = _solve_on(matrix, vector, passive)
        solution = candidate
    return solution


def _solve_on(matrix: Floats, vector: Floats, passive: NDArray[np.bool_]) -> Floats:
    """The free minimum over the chosen coordinates, the others 0."""
    solution: Floats = np.zeros(len(vector))
    chosen = np.flatnonzero(passive)
    if len(chosen):
        solution[chosen] = np.linalg.solve(matrix[np.ix_(chosen, chosen)], vector[chosen])
    return solution
