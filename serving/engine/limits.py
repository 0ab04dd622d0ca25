"""What an engine's steps and sequences stay within, and so what can never run here."""

from __future__ import annotations

from dataclasses import dataclass

from serving.engine.block_pool import BlockPool
from serving.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    max_num_seqs: int
    max_step_tokens: int
    max_context_tokens: int

    def __post_init__(self) -> None:
        assert min(self.max_num_seqs, self.max_step_tokens, self.max_context_tokens) > 0

    def why_never(self, prompt_tokens: int, pool: BlockPool) -> str | None:
        """Why so long a prompt cannot be served, however long it waits; None where it can."""
        if prompt_tokens == 0:
            return "the prompt is empty"
        if prompt_tokens + 1 > self.max_context_tokens:
            return f"{prompt_tokens} prompt tokens leave no room in a context of {self.max_context_tokens}"
        if pool.blocks_for(prompt_tokens + 1) > pool.num_blocks:
            return f"{prompt_tokens} prompt tokens are more than {pool.num_blocks} blocks can hold"
        return None

    def most_tokens(self, sequence: Sequence, pool: BlockPool) -> int:
        """With so many it has all it asked for, or fills context or pool (the last needs no slot)."""
        return min(
            sequence.prompt_tokens + sequence.sampling.max_tokens,
            self.max_context_tokens,
            pool.num_blocks * pool.block_tokens + 1,
        )
