"""When a replica would give a request its first token, known all that goes on inside it. Pure.

The replica's steps are played forward in numbers, as the scheduler would make them: one token for each
that decodes, the rest of the token budget for prefills in their order, admission in order while blocks
are left. True output lengths tell when a decode ends and its blocks are free. Two things are left out:
preemption, and the scheduler's holding back of admissions for growth that it expects.
"""

from __future__ import annotations

import math
from bisect import insort
from dataclasses import dataclass, field

from cluster.load import StepCoefficients


@dataclass(slots=True)
class Decode:
    """A sequence that gets a token a step until it has had `left` more."""

    left: int
    tokens: int
    blocks: int  # that are free when it ends


@dataclass(slots=True)
class Prefill:
    """A sequence whose tokens up to `total` are still to compute; admitted once `missing_blocks` are free."""

    computed: int
    total: int
    left: int  # output tokens it will have after its first
    blocks: int
    missing_blocks: int = 0
    ready_ms: float = 0.0  # from now until it is there


@dataclass(slots=True)
class Outlook:
    """A replica as it will be when the step under way ends, `busy_ms` from now."""

    step: StepCoefficients
    block_tokens: int
    max_step_tokens: int
    max_num_seqs: int
    available_blocks: int
    busy_ms: float = 0.0
    decodes: list[Decode] = field(default_factory=list)
    queue: list[Prefill] = field(default_factory=list)  # in the order of service


def first_token_ms(outlook: Outlook, mine: Prefill, limit_ms: float = math.inf) -> float:
    """Milliseconds from now until `mine`, last in line, has its first token; infinity beyond `limit_ms`.

    The outlook is read only.
    """
    step, budget_tokens = outlook.step, outlook.max_step_tokens
    ends = sorted((d.left, d.tokens, float(d.blocks)) for d in outlook.decodes)
    num_decodes, kv_tokens = len(ends), sum(d.tokens for d in outlook.decodes)
    available = float(outlook.available_blocks)
    prefills = [*outlook.queue, mine]
    computed = [prefill.computed for prefill in prefills]
    head = num_admitted = num_ended = num_steps = 0
    ms = outlook.busy_ms
    while ms < limit_ms:
        budget = budget_tokens - num_decodes
        tokens, context, pairs, logits = num_decodes, kv_tokens, float(kv_tokens), num_decodes
        finished = 0
        for place in range(head, len(prefills)):
            if budget <= 0:
                break
            prefill, start = prefills[place], computed[place]
            if place >= num_admitted:
                is_full = num_decodes + place - head >= outlook.max_num_seqs
                if is_full or prefill.missing_blocks > available or prefill.ready_ms > ms:
                    break
                available -= prefill.missing_blocks
                num_admitted = place + 1
            take = min(budget, prefill.total - start)
            budget -= take
            tokens += take
            context += start + take
            pairs += take * (start + take / 2)
            computed[place] = start + take
            if start + take == prefill.total:
                logits += 1
                finished += 1
        if tokens == 0:
            if prefills[head].ready_ms <= ms:
                return math.inf  # it will never have the blocks
            ms = prefills[head].ready_ms
            continue
        ms += step.predict_ms(tokens, context, logits, pairs)
        num_steps += 1
        kv_tokens += num_decodes
        available -= num_decodes / outlook.block_tokens
        for ended in prefills[head : head + finished]:
            if ended is mine:
                return ms
            head += 1
            if ended.left <= 0:
                available += ended.blocks
                continue
            # Sizes as of step 0, had it decoded since: when it ends, after so many steps, they are right.
            since = num_steps / outlook.block_tokens
            size = (ended.total + 1 - num_steps, ended.blocks - since)
            insort(ends, (num_steps + ended.left, *size), lo=num_ended)
            num_decodes += 1
            kv_tokens += ended.total + 1
        while num_ended < len(ends) and ends[num_ended][0] <= num_steps:
            lasted, tokens_before, blocks_before = ends[num_ended]
            kv_tokens -= tokens_before + lasted
            available += blocks_before + lasted / outlook.block_tokens
            num_ended += 1
            num_decodes -= 1
    return math.inf
