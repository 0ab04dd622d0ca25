"""What is noted of one request, as it happens."""

from __future__ import annotations

import math
from array import array
from dataclasses import dataclass, field
from typing import Literal

State = Literal["open", "ok", "refused", "failed"]


@dataclass(slots=True)
class Record:
    """One request. Times are seconds since the run began; those that never came are nan.

    `due_s` is when it should have been sent, and what its latencies count from: were it the moment
    of sending, a generator held up by a slow server would hide the wait it caused.
    """

    session: int
    turn: int
    due_s: float
    sent_s: float = math.nan
    first_s: float = math.nan  # the first piece of text
    end_s: float = math.nan
    gaps_ms: array[float] = field(default_factory=lambda: array("f"))  # between two pieces of text
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    state: State = "open"
    kind: str = ""  # of its failure, fit to be counted
    message: str = ""  # the failure in words
    refusals: int = 0  # also of those that a retry made good
    region: str = ""
    replica: str = ""

    @property
    def ttft_ms(self) -> float:
        return (self.first_s - self.due_s) * 1000

    @property
    def e2e_ms(self) -> float:
        return (self.end_s - self.due_s) * 1000

    @property
    def tpot_ms(self) -> float:
        """Mean time a token after the first; nan where there is no second."""
        if self.output_tokens < 2:
            return math.nan
        return (self.end_s - self.first_s) * 1000 / (self.output_tokens - 1)

    @property
    def lateness_ms(self) -> float:
        """How much later than due it was sent: this program's own fault."""
        return (self.sent_s - self.due_s) * 1000
