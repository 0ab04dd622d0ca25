"""Requests that a small model can serve on a core, and token ids that make their blocks what they say."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from serving.bench.router.calibration_engine import Script
from serving.bench.router.calibration_replica import ModelFacts
from serving.bench.router.capacity import at_load
from serving.bench.router.generated import GeneratorPlan, LogNormal, generate
from serving.bench.router.workload import Workload
from serving.block_hash import hash_blocks, hash_root
from serving.messages import RouteRequest, SamplingParams, Submit
from serving.simulator import SimRequest, SimSetup
from serving.simulator.journey import route_request

INGRESS = "ingress"
MAX_NEW_TOKENS = 256  # everybody's limit: it tells nothing of a reply's length
FIRST_TOKEN_ID = 1000  # below are special tokens and single bytes

PLAN = GeneratorPlan(
    num_requests=1000,
    tenant_rates=(3.0, 2.0, 1.0),
    prompts_a_tenant=4,
    system_tokens=LogNormal(128, 0.4, 32, 384),
    message_tokens=LogNormal(24, 0.6, 8, 128),
    output_tokens=LogNormal(24, 0.5, 4, 96),
    mean_turns=2.0,
    max_prompt_tokens=640,
    burst_share=0.0,
    day_depth=0.0,
    name="small",
)


def poisson(plan: GeneratorPlan, block_tokens: int, seed: int) -> Workload:
    """The plan's requests in their order, with exponential times between them, and nobody's own limit."""
    workload = generate(plan, block_tokens, seed)
    gaps_s = np.random.default_rng(seed).exponential(1.0, len(workload.requests))
    arrivals_s = np.cumsum(gaps_s) - gaps_s[0]
    requests = tuple(
        replace(request, arrival_s=float(at_s), max_tokens=MAX_NEW_TOKENS)
        for request, at_s in zip(workload.requests, arrivals_s, strict=True)
    )
    return replace(workload, requests=requests)


def scaled_to(workload: Workload, setup: SimSetup, load: float) -> Workload:
    """At this share of the capacity of a fleet like `setup`'s, taken to be of its first replica's kind."""
    first = setup.replicas[0]
    alike = tuple(replace(first, name=spec.name) for spec in setup.replicas)
    return at_load(workload, replace(setup, replicas=alike), load)


@dataclass(frozen=True, slots=True)
class RealRequest:
    """A simulated request as the real Router and engine are told of it."""

    simulated: SimRequest
    route: RouteRequest  # with a deadline of 0, to be set when it starts
    submit: Submit
    script: Script


def real_requests(
    requests: Sequence[SimRequest], facts: ModelFacts, block_tokens: int
) -> tuple[RealRequest, ...]:
    texts = _Texts(facts, block_tokens)
    return tuple(_real(request, texts, facts, block_tokens) for request in requests)


def _real(request: SimRequest, texts: _Texts, facts: ModelFacts, block_tokens: int) -> RealRequest:
    token_ids = texts.of(request)
    prompt = token_ids[: request.prompt_tokens]
    end = request.prompt_tokens + request.output_tokens
    root = hash_root(facts.name, facts.weight_version, facts.kv_dtype, request.tenant)
    route = route_request(replace(request, block_hashes=hash_blocks(root, prompt, block_tokens)))
    return RealRequest(
        simulated=request,
        route=route,
        submit=Submit(
            request_id=route.request_id,
            token_ids=prompt,
            sampling=SamplingParams(
                max_tokens=request.max_tokens,
                temperature=0.0,
                seed=request.number,
                stop_token_ids=(facts.stop_token_id,),
            ),
            reserve_blocks=0,
            hash_root=root,
            priority=request.priority,
        ),
        script=Script(
            seed=request.number,
            prompt_tokens=request.prompt_tokens,
            token_ids=(*token_ids[request.prompt_tokens : end - 1], facts.stop_token_id),
        ),
    )


class _Texts:
    """Token ids by the names of their blocks: equal names have equal tokens, others have others."""

    def __init__(self, facts: ModelFacts, block_tokens: int) -> None:
        assert facts.stop_token_id < FIRST_TOKEN_ID < facts.vocab_size
        self._vocab_size = facts.vocab_size
        self._block_tokens = block_tokens
        self._known: dict[bytes, tuple[int, ...]] = {}

    def of(self, request: SimRequest) -> tuple[int, ...]:
        """Prompt and reply; what is no full block is the request's own."""
        own = (f"{request.number} {index}".encode() for index in range(request.max_tokens))
        names = (*request.block_hashes, *request.output_hashes)
        return tuple(self._tokens((*names, *own), request.prompt_tokens + request.output_tokens))

    def _tokens(self, names: Sequence[bytes], num_tokens: int) -> Iterator[int]:
        for index in range(-(-num_tokens // self._block_tokens)):
            block = self._block(names[index])
            yield from block[: num_tokens - index * self._block_tokens]

    def _block(self, name: bytes) -> tuple[int, ...]:
        block = self._known.get(name)
        if block is None:
            rng = np.random.default_rng(int.from_bytes(name, "little"))
            ids = rng.integers(FIRST_TOKEN_ID, self._vocab_size, self._block_tokens)
            block = self._known[name] = tuple(ids.tolist())
        return block
