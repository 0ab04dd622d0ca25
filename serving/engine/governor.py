"""How large a step may be while tokens come in time: the batch under a TPOT target. Pure.

    limit    = target / lateness · (1 - margin)
    prefill  = the most new tokens n with  T(decodes + n) ≤ limit;  all there is room for with no decodes
    running  = the most sequences B with   T(B decodes, their contexts fully grown, + floor) ≤ limit

T is the step-time model's prediction. Every decode is in every step, so the time between two tokens of a
sequence is a step's; what the decodes leave of the limit goes to prefill, never less than a floor, so
that no prompt starves, and the bound on who runs keeps room for that floor. While a prompt waits, steps
are then as long as the target allows and hold as many tokens as fit: the most a target leaves.

`lateness` is how much longer the intervals between tokens were of late than predicted, in the mean,
interruptions and all. TPOT is a request's mean, so single slow steps need no margin; what does is the
error of a mean over a short answer's tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from cluster.load import StepCoefficients
from serving.engine.sequence import Sequence

MIN_PREFILL_TOKENS = 16
"""A step's prefill when decodes leave it no time; a prompt of 1,000 tokens is through in 63 steps."""


@dataclass(frozen=True, slots=True)
class StepBudget:
    """What one step may hold: decodes and prefill together, and the sequences running after admission."""

    max_tokens: int
    max_running: int


@dataclass(frozen=True, slots=True)
class RunningLoad:
    """What runs now, as the next step's decodes and prefills see it."""

    num_running: int
    num_decoding: int
    decode_kv_tokens: int  # context tokens of the decoding ones
    full_kv_tokens: int  # of all running ones, when they will have grown to what they reserved
    prefill_start: int  # the first prefilling one's computed tokens: its next chunk attends to them

    @classmethod
    def of(cls, running: Iterable[Sequence]) -> RunningLoad:
        num_running = num_decoding = decode_kv = full_kv = 0
        prefill_start: int | None = None
        for sequence in running:
            num_running += 1
            tokens = sequence.num_tokens
            end = sequence.prompt_tokens + sequence.sampling.max_tokens
            full_kv += max(tokens, min(end, sequence.reserve_blocks * sequence.block_tokens))
            if sequence.is_decoding:
                num_decoding += 1
                decode_kv += tokens
            elif prefill_start is None:
                prefill_start = sequence.num_computed
        return cls(num_running, num_decoding, decode_kv, full_kv, prefill_start or 0)


class Governor:
    """Sets each step's budget so that requests' mean time a token stays within `tpot_ms`."""

    _RATE = 0.02  # lateness is a mean over about 50 steps
    _MOST_LATE = 1.5
    # A mean of 32 errors lies within this many usual (median) errors in 99 of 100: 2.33 · 1.48 / √32.
    _MEAN_ERRORS = 0.6
    _WIDEST_MARGIN = 0.1

    def __init__(self, tpot_ms: float, max_step_tokens: int, max_num_seqs: int) -> None:
        assert tpot_ms > 0
        self._tpot_ms = tpot_ms
        self._max_step_tokens = max_step_tokens
        self._max_num_seqs = max_num_seqs
        self._interval_ms = self._predicted_ms = 0.0

    def limit_ms(self, usual_error: float) -> float:
        """The longest a step with decodes should be predicted to take."""
        lateness = self._interval_ms / self._predicted_ms if self._predicted_ms > 0 else 1.0
        lateness = min(max(lateness, 1.0), self._MOST_LATE)
        margin = min(self._MEAN_ERRORS * usual_error, self._WIDEST_MARGIN)
        return self._tpot_ms / lateness * (1 - margin)

    def observe(self, interval_ms: float, predicted_ms: float) -> None:
        """A step with decodes was to take `predicted_ms`; their tokens came `interval_ms` apart."""
        if self._predicted_ms == 0:
            self._interval_ms, self._predicted_ms = interval_ms, predicted_ms
        self._interval_ms += self._RATE * (min(interval_ms, 10 * predicted_ms) - self._interval_ms)
        self._predicted_ms += self._RATE * (predicted_ms - self._predicted_ms)

    def budget(self, load: RunningLoad, step: StepCoefficients, usual_error: float) -> StepBudget:
        limit_ms = self.limit_ms(usual_error)
        return StepBudget(
            max_tokens=load.num_decoding + self._prefill_tokens(load, step, limit_ms),
            max_running=self._running(load, step, limit_ms),
        )

    def _prefill_tokens(self, load: RunningLoad, step: StepCoefficients, limit_ms: float) -> int:
        room = self._max_step_tokens - load.num_decoding
        if load.num_decoding == 0:
            return room

        def fits(new_tokens: int) -> bool:
            ms = step.predict_ms(
                load.num_decoding + new_tokens,
                load.decode_kv_tokens + load.prefill_start + new_tokens,
                load.num_decoding + 1,
                load.decode_kv_tokens + new_tokens * (load.prefill_start + new_tokens / 2),
            )
            return ms <= limit_ms

        return max(min(MIN_PREFILL_TOKENS, room), _largest(fits, room))

    def _running(self, load: RunningLoad, step: StepCoefficients, limit_ms: float) -> int:
        context_tokens = load.full_kv_tokens / load.num_running if load.num_running else 0.0

        def fits(batch: int) -> bool:
            kv_tokens = math.ceil(max(batch * context_tokens, load.full_kv_tokens))
            ms = step.predict_ms(batch + MIN_PREFILL_TOKENS, kv_tokens, batch, kv_tokens)
            return ms <= limit_ms

        return max(1, _largest(fits, self._max_num_seqs))


def _largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest of 0 ... `most` that fits, where whatever is smaller than one that fits does too."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    return low
