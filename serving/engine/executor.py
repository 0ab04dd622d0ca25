"""The border between the engine's bookkeeping and its tensors."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from serving.engine.plan import SamplingBatch, StepPlan


class Executor(Protocol):
    """Runs a step on every rank. `Worker` is the real one; tests use a fake."""

    @property
    def num_blocks(self) -> int:
        """Blocks in the KV pool, the same on every rank."""
        ...

    def execute(self, plan: StepPlan, sampling: SamplingBatch) -> NDArray[np.int32]:
        """Run the model over `plan` and draw one token a wanted row.

        Returns [S] token ids; -1 where the row's logits were not finite.
        """
        ...

    def close(self) -> None:
        """End the other ranks and release memory."""
        ...
