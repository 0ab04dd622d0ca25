"""How far a dtype's answers are from the float32 model's: divergence and greedy agreement.

The reference continues each prompt greedily; both models are given its tokens (teacher forcing) and
asked for the next one at each. Two ways, because a fast path may depend on a step's shape:

    decode   one token a step of many sequences, as they are generated
    prefill  prompt and continuation in one step

    KL(reference ‖ candidate) = Σ_v p_v (log p_v - log q_v), in nats, of one position (Kullback, Leibler 1951)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import msgspec
import numpy as np
import torch
from rich.console import Console

from serving.bench.engine.offline import EngineSetup, EngineUnderTest
from serving.bench.engine.prompts import chat_prompts
from serving.bench.engine.report import Verdict
from serving.bench.engine.tables import print_verdicts
from serving.engine.plan import StepPlan
from serving.engine.scheduled_step import Chunk, ScheduledStep, build_plan
from serving.engine.sequence import Sequence as EngineSequence
from serving.messages import SamplingParams, Submit
from serving.tokenizer import Tokenizer

NUM_PROMPTS = 200
NEW_TOKENS = 32
GROUP = 50  # sequences a step
MAX_KL, MIN_AGREEMENT = 0.02, 0.95

Way = Literal["decode", "prefill"]


class Quality(msgspec.Struct, frozen=True, kw_only=True):
    """One dtype, one way. KL in nats over `positions`; agreement is the share of equal best tokens."""

    dtype: str
    way: Way
    prompts: int
    positions: int
    mean_kl: float
    p99_kl: float
    agreement: float


@dataclass
class _Tally:
    kl: list[torch.Tensor] = field(default_factory=list)
    agrees: list[torch.Tensor] = field(default_factory=list)

    def add(self, reference: torch.Tensor, candidate: torch.Tensor) -> None:
        """Logits [rows, V] of the same positions."""
        log_p, log_q = reference.double().log_softmax(-1), candidate.double().log_softmax(-1)
        self.kl.append((log_p.exp() * (log_p - log_q)).sum(-1))
        self.agrees.append(reference.argmax(-1) == candidate.argmax(-1))

    def quality(self, dtype: str, way: Way, prompts: int) -> Quality:
        kl = torch.cat(self.kl)
        return Quality(
            dtype=dtype,
            way=way,
            prompts=prompts,
            positions=len(kl),
            mean_kl=float(kl.mean()),
            p99_kl=float(kl.quantile(0.99)),
            agreement=float(torch.cat(self.agrees).double().mean()),
        )


def logits(under_test: EngineUnderTest, plan: StepPlan) -> torch.Tensor:
    """Float32 logits [S, V] of `plan`, as the engine's steps compute them before they draw."""
    result: torch.Tensor = under_test.runner.logits(plan)
    return result


def run(
    setups: Sequence[EngineSetup],
    console: Console,
    num_prompts: int = NUM_PROMPTS,
    on_progress: Callable[[str], None] = lambda what: None,
) -> list[Quality]:
    """Both ways for the dtype of each of `setups`, which share their model; prints the verdicts."""
    found = []
    with EngineUnderTest(replace(setups[0], dtype="float32", kv_dtype="auto")) as reference:
        prompts = chat_prompts(Tokenizer(reference.files), num_prompts)
        for setup in setups:
            with EngineUnderTest(setup) as candidate:
                found += compare(reference, candidate, prompts, on_progress)
    print_verdicts([verdict for quality in found for verdict in verdicts(quality)], console)
    return found


def compare(
    reference: EngineUnderTest,
    candidate: EngineUnderTest,
    prompts: Sequence[tuple[int, ...]],
    on_progress: Callable[[str], None] = lambda what: None,
) -> list[Quality]:
    """The candidate against the reference on `prompts`, decode and prefill."""
    decode, prefill = _Tally(), _Tally()
    for start in range(0, len(prompts), GROUP):
        group = prompts[start : start + GROUP]
        on_progress(
            f"quality of {candidate.dtype}: prompts {start + 1}-{start + len(group)} of {len(prompts)}"
        )
        continuations = _compare_decode(reference, candidate, group, decode)
        for prompt, continuation in zip(group, continuations, strict=True):
            plan = step_plan([(prompt + continuation, 0)], reference.setup.block_tokens)
            rows = np.arange(len(prompt) - 1, len(prompt) + len(continuation) - 1, dtype=np.int32)
            plan = replace(plan, logits_rows=rows)
            prefill.add(logits(reference, plan), logits(candidate, plan))
    return [
        decode.quality(candidate.precision, "decode", len(prompts)),
        prefill.quality(candidate.precision, "prefill", len(prompts)),
    ]


def verdicts(quality: Quality) -> list[Verdict]:
    what = f"{quality.dtype}, {quality.way}, {quality.prompts} prompts, {quality.positions} tokens"
    return [
        Verdict(
            f"{what}: mean KL to float32 (p99 {quality.p99_kl:.4f})",
            f"<= {MAX_KL}",
            quality.mean_kl,
            quality.mean_kl <= MAX_KL,
        ),
        Verdict(
            f"{what}: greedy agreement",
            f">= {MIN_AGREEMENT}",
            quality.agreement,
            quality.agreement >= MIN_AGREEMENT,
        ),
    ]


def step_plan(
    sequences: Sequence[tuple[tuple[int, ...], int]], block_tokens: int, width: int = 0
) -> StepPlan:
    """One step of sequences (token ids, how many of them are computed), asking for each last token's logits.

    Sequence i owns blocks `i * width : (i + 1) * width`; `width` 0 is as many as the longest needs.
    """
    width = width or -(-max(len(ids) for ids, _ in sequences) // block_tokens)
    chunks = []
    for index, (ids, computed) in enumerate(sequences):
        submit = Submit(
            request_id=str(index),
            token_ids=ids,
            sampling=SamplingParams(max_tokens=1),
            reserve_blocks=0,
            hash_root=b"",
        )
        sequence = EngineSequence.from_submit(submit, block_tokens)
        sequence.block_table.extend(range(index * width, (index + 1) * width))
        chunks.append(Chunk(sequence, computed, len(ids) - computed, is_decode=False, wants_token=True))
    plan, _ = build_plan(ScheduledStep(1, tuple(chunks), 0, 0, 0), block_tokens)
    return plan


def _compare_decode(
    reference: EngineUnderTest,
    candidate: EngineUnderTest,
    prompts: Sequence[tuple[int, ...]],
    tally: _Tally,
) -> list[tuple[int, ...]]:
    """Continue `prompts` by the reference, both models step by step; returns the continuations.

    One that has ended goes along, uncounted, so that the batch stays as it is.
    """
    block_tokens, eos_ids = reference.setup.block_tokens, reference.spec.eos_token_ids
    width = -(-(max(map(len, prompts)) + NEW_TOKENS) // block_tokens)
    sequences = [(prompt, 0) for prompt in prompts]
    lengths = np.zeros(len(prompts), dtype=np.int64)  # of the continuations, their end included
    has_ended = np.zeros(len(prompts), dtype=bool)
    for _ in range(NEW_TOKENS):
        plan = step_plan(sequences, block_tokens, width)
        expected, found = logits(reference, plan), logits(candidate, plan)
        counted = torch.from_numpy(~has_ended)
        tally.add(expected[counted], found[counted])
        tokens = expected.argmax(-1).tolist()
        lengths += ~has_ended
        has_ended |= np.isin(tokens, eos_ids)
        sequences = [((*ids, token), len(ids)) for (ids, _), token in zip(sequences, tokens, strict=True)]
    return [
        ids[len(prompt) : len(prompt) + length]
        for (ids, _), prompt, length in zip(sequences, prompts, lengths.tolist(), strict=True)
    ]
