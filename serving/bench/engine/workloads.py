"""What a GPU's engine is given to do, request by request. Pure: the same requests at every run.

    batch          nano-vllm's bench.py: 256 requests of 100-1,024 tokens in, 100-1,024 out, all at once
    decode         B sequences, a short prompt each, many steps
    context        the same at a context of 8k
    prefill        prompts alone, of 8k and of 1k, one token drawn of each

Sizes are a `Scale`'s; a rehearsal's are tiny, and its figures mean nothing.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from serving.bench.engine.offline import BenchRequest
from serving.model_spec import ModelSpec

Kind = Literal["batch", "decode", "context", "prefill"]
KINDS: tuple[Kind, ...] = ("batch", "decode", "context", "prefill")

NANO_SEED, NANO_TOP_ID, NANO_SHORTEST = 0, 10_000, 100
SAMPLED_TEMPERATURE = 0.6


@dataclass(frozen=True)
class Workload:
    """`requests` arrive at once."""

    name: str
    kind: Kind
    requests: tuple[BenchRequest, ...]

    @property
    def lengths(self) -> list[tuple[int, int]]:
        """Tokens in and out of each request."""
        return [(len(request.token_ids), request.max_tokens) for request in self.requests]

    @property
    def tokens_in(self) -> int:
        return sum(tokens for tokens, _ in self.lengths)

    @property
    def tokens_out(self) -> int:
        return sum(tokens for _, tokens in self.lengths)


@dataclass(frozen=True)
class Scale:
    """Sizes of all workloads; lengths in tokens. A model's context may make them smaller."""

    requests: int = 256
    longest: int = 1024  # of the batch's prompts and of its answers
    decode_batches: tuple[int, ...] = (1, 32, 256)
    decode_prompt: int = 128
    decode_new: int = 256
    context: int = 8192
    context_batches: tuple[int, ...] = (1, 8, 32)
    context_new: int = 128
    prefills: tuple[tuple[int, int], ...] = ((1, 8192), (4, 8192), (64, 1024))  # prompts, their tokens
    max_step_tokens: int = 8192
    traced_steps: int = 200

    @property
    def max_num_seqs(self) -> int:
        return max(self.requests, *self.decode_batches, *self.context_batches)


REHEARSAL = Scale(
    requests=6,
    longest=110,
    decode_batches=(1, 4),
    decode_prompt=8,
    decode_new=12,
    context=256,
    context_batches=(1, 2),
    context_new=8,
    prefills=((1, 256), (4, 64)),
    max_step_tokens=256,
    traced_steps=5,
)


def workloads(spec: ModelSpec, kinds: tuple[Kind, ...], scale: Scale) -> Iterator[Workload]:
    """In the order of KINDS; those of one kind differ in size."""
    if "batch" in kinds:
        for temperature, name in ((SAMPLED_TEMPERATURE, "sampled"), (0.0, "greedy")):
            requests = nano_requests(scale.requests, scale.longest, temperature)
            yield Workload(f"{scale.requests} requests, {name}", "batch", requests)
    if "decode" in kinds:
        for batch in scale.decode_batches:
            requests = equal_requests(spec, batch, scale.decode_prompt, scale.decode_new)
            yield Workload(f"decode, batch {batch}", "decode", requests)
    if "context" in kinds:
        context = min(scale.context, spec.context_tokens)
        for batch in scale.context_batches:
            requests = equal_requests(spec, batch, context - scale.context_new, scale.context_new)
            yield Workload(f"decode at {context}, batch {batch}", "context", requests)
    if "prefill" in kinds:
        for count, tokens in scale.prefills:
            prompt = min(tokens, spec.context_tokens - 1)
            yield Workload(f"prefill {count} x {prompt}", "prefill", equal_requests(spec, count, prompt, 1))


def nano_requests(
    count: int = 256, longest: int = 1024, temperature: float = 0.0
) -> tuple[BenchRequest, ...]:
    """The requests of nano-vllm's bench.py, drawn as there: all prompts first, then all lengths."""
    draw = random.Random(NANO_SEED).randint
    prompts = [tuple(draw(0, NANO_TOP_ID) for _ in range(draw(NANO_SHORTEST, longest))) for _ in range(count)]
    return tuple(
        BenchRequest(prompt, draw(NANO_SHORTEST, longest), temperature=temperature) for prompt in prompts
    )


def equal_requests(spec: ModelSpec, count: int, tokens_in: int, tokens_out: int) -> tuple[BenchRequest, ...]:
    """Prompts of one length that share no block."""
    rng = random.Random(count * tokens_in)
    ids = range(spec.vocab_size)
    return tuple(BenchRequest(tuple(rng.choices(ids, k=tokens_in)), tokens_out) for _ in range(count))
