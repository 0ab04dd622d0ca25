"""A workload for those without a trace: tenants' sessions, turn upon turn, over a day with bursts.

    tenant ──system prompts──► session ──turns──► prompt = system prompt + all before + a new message

Sessions begin at random instants, their rate a wave over the day with another phase in each region,
plus bursts: sessions of one tenant and prompt that come within a second or two. A turn follows its
predecessor's arrival after an expected answering time and a pause to think. Lengths are log-normal.
A prompt repeats the session's earlier replies, so their blocks are named too (`output_hashes`).
Everything follows from the seed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np

from serving.bench.router.workload import Workload, hash_chain, in_order
from serving.simulator import SimRequest

MAX_NEW_TOKENS = 2048


@dataclass(frozen=True, slots=True)
class LogNormal:
    """By its median and the standard deviation of its logarithm, cut to a range of whole numbers."""

    median: float
    sigma: float
    least: int
    most: int

    def draw(self, rng: np.random.Generator) -> int:
        return int(np.clip(round(rng.lognormal(math.log(self.median), self.sigma)), self.least, self.most))


@dataclass(frozen=True, slots=True)
class GeneratorPlan:
    """`tenant_rates` are sessions' shares, one a tenant; they need not sum to anything.

    The defaults imitate chat over documents: 4 turns a session, prompts of ten thousand tokens in the mean.
    """

    num_requests: int = 2400
    span_s: float = 600.0  # in which they arrive, before any scaling
    lead_s: float = 300.0  # sessions that began so long before are in their later turns
    regions: tuple[str, ...] = ("local",)
    tenant_rates: tuple[float, ...] = (8.0, 4.0, 2.0, 1.0, 1.0)
    prompts_a_tenant: int = 8
    system_tokens: LogNormal = LogNormal(1500, 0.8, 64, 12_000)
    message_tokens: LogNormal = LogNormal(1500, 1.2, 8, 24_000)
    output_tokens: LogNormal = LogNormal(240, 0.8, 1, MAX_NEW_TOKENS)
    mean_turns: float = 4.0
    think_s: LogNormal = LogNormal(15, 1.0, 1, 300)
    answer_tpot_s: float = 0.03  # a turn waits so long a token of the reply before it
    max_prompt_tokens: int = 60_000  # a session ends before it grows beyond this
    day_depth: float = 0.1  # sessions begin at a rate of 1 + depth * cos(2 pi (t / span - region's phase))
    burst_share: float = 0.1  # of the sessions come in bursts
    burst_sessions: int = 8
    burst_s: float = 1.0
    name: str = "generated"


def generate(plan: GeneratorPlan, block_tokens: int, seed: int) -> Workload:
    """The workload of this plan and seed: `plan.num_requests` requests."""
    rng = np.random.default_rng(seed)
    prompts = _SystemPrompts(plan, block_tokens, rng)
    requests: list[SimRequest] = []
    num_sessions = 0
    for start in _session_starts(plan, rng):
        if len(requests) >= plan.num_requests:
            break
        turns = _session(plan, num_sessions, start, prompts, rng)
        requests += [request for request in turns if 0 <= request.arrival_s < plan.span_s]
        num_sessions += 1
    note = f"{num_sessions} sessions of {len(plan.tenant_rates)} tenants, generated with seed {seed}"
    return Workload(plan.name, in_order(requests[: plan.num_requests]), (note,))


@dataclass(frozen=True, slots=True)
class _Start:
    """Of a session: when, where, whose, with which system prompt."""

    at_s: float
    region: int
    tenant: int
    prompt: int


class _SystemPrompts:
    """The tenants' system prompts: their lengths and the names of their full blocks."""

    def __init__(self, plan: GeneratorPlan, block_tokens: int, rng: np.random.Generator) -> None:
        self.block_tokens = block_tokens
        self._known: dict[tuple[int, int], tuple[int, list[bytes]]] = {}
        for tenant in range(len(plan.tenant_rates)):
            for number in range(plan.prompts_a_tenant):
                tokens = plan.system_tokens.draw(rng)
                names = hash_chain(b"", f"tenant {tenant} prompt {number} ".encode())
                blocks = list(islice(names, tokens // block_tokens))
                self._known[tenant, number] = tokens, blocks

    def of(self, start: _Start) -> tuple[int, list[bytes]]:
        return self._known[start.tenant, start.prompt]


def _session_starts(plan: GeneratorPlan, rng: np.random.Generator) -> Iterator[_Start]:
    """Endless, in no order of time: any number of them covers the whole span, and the lead before it.

    A burst of n sessions is as likely as `burst_share` of the sessions asks for.
    """
    rates = np.array(plan.tenant_rates) / sum(plan.tenant_rates)
    size = plan.burst_sessions
    burst_chance = plan.burst_share / (plan.burst_share + size * (1 - plan.burst_share))
    while True:
        region = int(rng.integers(len(plan.regions)))
        at_s = float(rng.uniform(-plan.lead_s, plan.span_s))
        wave = math.cos(2 * math.pi * (at_s / plan.span_s - region / len(plan.regions)))
        if rng.random() * (1 + plan.day_depth) > 1 + plan.day_depth * wave:
            continue
        tenant = int(rng.choice(len(rates), p=rates))
        prompt = int(rng.integers(plan.prompts_a_tenant))
        for _ in range(size if rng.random() < burst_chance else 1):
            yield _Start(at_s, region, tenant, prompt)
            at_s += float(rng.uniform(0.0, 2 * plan.burst_s / size))


def _session(
    plan: GeneratorPlan, number: int, start: _Start, prompts: _SystemPrompts, rng: np.random.Generator
) -> Iterator[SimRequest]:
    """A session's turns; at least one, and their number is geometric."""
    block_tokens = prompts.block_tokens
    shared_tokens, shared = prompts.of(start)
    blocks = list(shared)
    own = hash_chain(shared[-1] if shared else b"", f"session {number} ".encode(), len(shared))
    at_s, tokens = start.at_s, shared_tokens
    for turn in range(int(rng.geometric(1 / plan.mean_turns))):
        tokens += plan.message_tokens.draw(rng)
        output_tokens = plan.output_tokens.draw(rng)
        if turn > 0 and tokens > plan.max_prompt_tokens:
            return
        num_prompt = tokens // block_tokens
        num_whole = (tokens + output_tokens) // block_tokens
        blocks += islice(own, num_whole - len(blocks))
        yield SimRequest(
            number=0,
            arrival_s=at_s,
            region=plan.regions[start.region],
            tenant=f"tenant-{start.tenant}",
            priority=0,
            prompt_tokens=tokens,
            output_tokens=output_tokens,
            max_tokens=MAX_NEW_TOKENS,
            block_hashes=tuple(blocks[:num_prompt]),
            session=number,
            output_hashes=tuple(blocks[num_prompt:num_whole]),
        )
        tokens += output_tokens
        at_s += output_tokens * plan.answer_tpot_s + plan.think_s.draw(rng)
