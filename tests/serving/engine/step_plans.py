"""Plans and greedy generation for tests that drive a Worker without a scheduler."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from serving.engine.executor import Executor
from serving.engine.plan import SamplingBatch, StepPlan


@dataclass(frozen=True)
class Span:
    """Tokens of one sequence to run, the first of them at position `start`."""

    tokens: list[int]
    start: int
    blocks: list[int]


def step_plan(spans: list[Span], block_tokens: int) -> StepPlan:
    """The plan of one step over `spans`, wanting the logits of each one's last token."""
    lens = [len(span.tokens) for span in spans]
    positions = [np.arange(span.start, span.start + n) for span, n in zip(spans, lens, strict=True)]
    slots = [
        np.array(span.blocks)[at // block_tokens] * block_tokens + at % block_tokens
        for span, at in zip(spans, positions, strict=True)
    ]
    tables = np.zeros((len(spans), max(len(span.blocks) for span in spans)), dtype=np.int32)
    for row, span in zip(tables, spans, strict=True):
        row[: len(span.blocks)] = span.blocks
    ends = np.cumsum(lens)
    return StepPlan(
        token_ids=np.concatenate([span.tokens for span in spans]).astype(np.int32),
        positions=np.concatenate(positions).astype(np.int32),
        slot_mapping=np.concatenate(slots).astype(np.int32),
        query_start=np.concatenate(([0], ends)).astype(np.int32),
        context_lens=np.array([span.start + len(span.tokens) for span in spans], dtype=np.int32),
        block_tables=tables,
        logits_rows=(ends - 1).astype(np.int32),
    )


def greedy(rows: int) -> SamplingBatch:
    """Sampling controls under which every row takes its largest logit."""
    zeros = np.zeros(rows, dtype=np.float32)
    whole = np.zeros(rows, dtype=np.int32)
    return SamplingBatch(zeros, whole, zeros + 1, zeros, np.zeros(rows, dtype=np.uint64), whole)


def generate(
    executor: Executor,
    prompts: list[list[int]],
    new_tokens: int,
    block_tokens: int,
    chunk_tokens: int = 10**6,
) -> list[list[int]]:
    """Greedy continuations of `prompts`, run as one batch, with blocks scattered over the pool."""
    blocks = iter(np.random.default_rng(0).permutation(executor.num_blocks).tolist())
    tables = [
        [next(blocks) for _ in range(-(-(len(prompt) + new_tokens) // block_tokens))] for prompt in prompts
    ]
    done = [0] * len(prompts)
    texts = [list(prompt) for prompt in prompts]
    while live := [i for i, prompt in enumerate(prompts) if len(texts[i]) < len(prompt) + new_tokens]:
        spans = [Span(texts[i][done[i] : done[i] + chunk_tokens], done[i], tables[i]) for i in live]
        tokens = executor.launch(step_plan(spans, block_tokens), greedy(len(spans))).tokens()
        for i, span, token in zip(live, spans, tokens.tolist(), strict=True):
            done[i] += len(span.tokens)
            if done[i] == len(texts[i]):  # else this was not the prompt's last chunk
                texts[i].append(token)
    return [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]
