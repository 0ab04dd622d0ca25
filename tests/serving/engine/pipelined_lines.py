"""Sequences whose steps are launched ahead of their tokens; the plain runner that they are compared with."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import torch

from kernels.sampling import SamplingControls, sample
from serving.engine.cuda_runner import CudaRunner, Pending
from serving.engine.executor import Done
from serving.engine.graph_buckets import StepLimits
from serving.engine.model_runner import ModelRunner, allocate_kv_cache
from serving.engine.plan import SamplingBatch
from serving.model_spec import read_model_spec
from serving.models.layers import Shard
from serving.models.llama import Llama
from serving.models.weights import open_weights
from tests.serving.engine.step_plans import Span, greedy, step_plan
from tests.serving.models.tiny_llama import VOCAB_SIZE

CPU = torch.device("cpu")
NUM_BLOCKS = 120
BLOCK_TOKENS = 16
LIMITS = StepLimits(max_num_seqs=6, max_context_tokens=256, num_blocks=NUM_BLOCKS, block_tokens=BLOCK_TOKENS)
PROMPT_LENS = (1, 5, 16, 17, 40, 100)


def load(folder, dtype: torch.dtype) -> Llama:
    spec = read_model_spec(folder)
    return Llama(spec, open_weights(tuple(folder.glob("*.safetensors")), spec, dtype), CPU, Shard())


def random_tokens(count: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCAB_SIZE, (count,), generator=generator).tolist()


PROMPTS = [random_tokens(count, seed) for seed, count in enumerate(PROMPT_LENS)]


class Plain:
    """The reference: the model runner, each step on its own."""

    num_blocks = NUM_BLOCKS
    bytes_per_weight = 4.0
    runs_ahead = False

    def __init__(self, model: Llama) -> None:
        cache = allocate_kv_cache(model, NUM_BLOCKS, BLOCK_TOKENS, model.dtype, CPU)
        self.runner = ModelRunner(model, cache)

    def launch(self, plan, sampling):
        logits = self.runner.logits(plan)
        parts = (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p)
        columns = (*parts, sampling.seed.view(np.int64), sampling.position)
        return Done(sample(logits, SamplingControls(*map(torch.tensor, columns))).numpy())


@dataclass
class Line:
    """A sequence in a pipeline that is one step deep: its newest token may be on the device alone."""

    prompt: list[int]
    blocks: list[int]
    new_tokens: int
    seed: int = 0
    temperature: float = 0.0
    num_launched: int = 0  # of the tokens after the prompt
    place: int = 0  # among those that the last step drew
    tokens: list[int] = field(default_factory=list)

    def span(self) -> Span:
        if self.num_launched == 0:
            return Span(self.prompt, 0, self.blocks)
        start = len(self.prompt) + self.num_launched - 1
        is_known = self.num_launched <= len(self.tokens)
        return Span([self.tokens[self.num_launched - 1] if is_known else -1 - self.place], start, self.blocks)


def sampling_of(lines: list[Line]) -> SamplingBatch:
    positions = [len(line.prompt) + line.num_launched for line in lines]
    return replace(
        greedy(len(lines)),
        temperature=np.array([line.temperature for line in lines], dtype=np.float32),
        seed=np.array([line.seed for line in lines], dtype=np.uint64),
        position=np.array(positions, dtype=np.int32),
    )


def run_pipelined(runner: CudaRunner, arrivals: dict[int, list[Line]], *, patient: bool = False) -> None:
    """Launch each step before the tokens of the one before are asked for, or, `patient`, after; `arrivals`
    join at their step."""
    arrivals = dict(arrivals)
    live: list[Line] = []
    before: tuple[Pending, list[Line]] | None = None
    step = 0
    while live or arrivals or before:
        live += arrivals.pop(step, [])
        step += 1
        launched = None
        if live:
            plan = step_plan([line.span() for line in live], BLOCK_TOKENS)
            launched = runner.launch(plan, sampling_of(live)), list(live)
        for place, line in enumerate(live):
            line.num_launched += 1
            line.place = place
        if patient:
            before, launched = launched, None
        if before is not None:
            pending, lines = before
            for line, token in zip(lines, pending.tokens().tolist(), strict=True):
                line.tokens.append(token)
        before = launched
        live = [line for line in live if line.num_launched < line.new_tokens]


def lines_of(prompts: list[list[int]], new_tokens: list[int], temperature: float = 0.0) -> list[Line]:
    """Sequences with scattered blocks of their own."""
    free = iter(np.random.default_rng(0).permutation(NUM_BLOCKS).tolist())
    return [
        Line(
            prompt,
            [next(free) for _ in range(-(-(len(prompt) + more) // BLOCK_TOKENS))],
            more,
            seed=2**63 + number,
            temperature=temperature,
        )
        for number, (prompt, more) in enumerate(zip(prompts, new_tokens, strict=True))
    ]


def alone(model: Llama, line: Line) -> list[int]:
    """The same tokens one by one, each step by itself on the plain runner."""
    plain, twin = Plain(model), replace(line, tokens=[], num_launched=0)
    while len(twin.tokens) < line.new_tokens:
        plan, sampling = step_plan([twin.span()], BLOCK_TOKENS), sampling_of([twin])
        twin.tokens += plain.launch(plan, sampling).tokens().tolist()
        twin.num_launched += 1
    return twin.tokens
