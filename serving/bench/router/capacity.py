"""How busy a load keeps a fleet, by the step-time model, and the time scale that makes it so busy.

Work is counted as if the fleet were one machine. A part `f` of its KV memory holds the sequences that
run, the rest is one LRU cache. With `c` the step coefficients, summed over the requests (`p` prompt
tokens, `u` those of them that this cache does not hold, `o` output tokens, the first of which comes
with the prefill):

    marginal_ms  = Σ per_token·(u + o - 1) + per_logit·o + per_pair·u·(p - u/2)
                   + (per_kv_token + per_pair)·(o - 1)·(p + o/2) + per_kv_token·chunks(u)·(p - u/2)
    batch        = min(max_num_seqs, f · KV tokens of a replica / mean tokens of a decoding sequence)
    steps        = max(Σ (o - 1) / batch, Σ u / max_step_tokens)
    busy_ms(f)   = base·steps + marginal_ms
    utilisation  = min over f of busy_ms(f) / (replicas · span_ms)

A larger `f` makes fuller batches, a smaller one more hits. At utilisation 1 a fleet that splits its
memory at its best has nothing to spare; no placement of whole requests on replicas quite gets there.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from serving.bench.router.oracles import pooled_lru
from serving.bench.router.workload import Workload, time_scaled
from serving.errors import ConfigError
from serving.simulator import SimReplica, SimSetup

RUNNING_SHARES = (0.3, 0.5, 0.7, 0.9)

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Work:
    """What a workload takes of a fleet of equal replicas, its memory split at its best."""

    busy_s: float  # of one replica's time
    running_share: float  # of the KV memory, `f`
    batch: float  # sequences that decode together
    prefill_share: float  # of the busy time
    hit_share: float  # of the prompts' blocks

    def utilisation(self, num_replicas: int, span_s: float) -> float:
        return self.busy_s / (num_replicas * span_s)


def work_of(workload: Workload, setup: SimSetup) -> Work:
    """The formula at the top of the file; all replicas must be equal."""
    first = setup.replicas[0]
    assert all(_same_kind(first, other) for other in setup.replicas), "replicas differ"
    return min((_work_at(share, workload, setup) for share in RUNNING_SHARES), key=lambda work: work.busy_s)


def _work_at(running_share: float, workload: Workload, setup: SimSetup) -> Work:
    first, requests = setup.replicas[0], workload.requests
    hits = pooled_lru(requests, int(num_blocks(setup) * (1 - running_share)), setup.block_tokens)
    prompt = np.array([request.prompt_tokens for request in requests], dtype=float)
    output = np.array([min(r.output_tokens, r.max_tokens) for r in requests], dtype=float)
    uncached = prompt - np.array(hits.by_request, dtype=float) * setup.block_tokens
    prefill_ms = _prefill_ms(first, prompt, uncached)
    decodes, contexts = output - 1, (output - 1) * (prompt + output / 2)
    step = first.step
    decode_ms = (step.per_token_ms + step.per_logit_ms) * decodes.sum()
    decode_ms += (step.per_kv_token_ms + step.per_pair_ms) * contexts.sum()
    mean_tokens = max(1.0, contexts.sum() / max(1.0, decodes.sum()))
    memory_tokens = running_share * first.num_blocks * setup.block_tokens
    batch = max(1.0, min(first.max_num_seqs, memory_tokens / mean_tokens))
    num_steps = max(decodes.sum() / batch, uncached.sum() / first.max_step_tokens)
    busy_ms = float(step.base_ms * num_steps + prefill_ms + decode_ms)
    return Work(busy_ms / 1e3, running_share, float(batch), prefill_ms / busy_ms, hits.share)


def _prefill_ms(replica: SimReplica, prompt: Floats, uncached: Floats) -> float:
    """Of all prompts, without the steps' base."""
    step, context = replica.step, prompt - uncached / 2
    chunks = np.ceil(uncached / replica.max_step_tokens)
    ms = step.per_token_ms * uncached + step.per_logit_ms
    ms = ms + step.per_pair_ms * uncached * context + step.per_kv_token_ms * chunks * context
    return float(ms.sum())


def at_load(workload: Workload, setup: SimSetup, utilisation: float) -> Workload:
    """`workload` with its time stretched or compressed to this utilisation of `setup`'s fleet."""
    if utilisation <= 0:
        raise ConfigError(f"--load {utilisation}: give a share of the fleet's capacity above 0, like 0.85")
    if workload.span_s <= 0:
        raise ConfigError(f"{workload.name}: all requests arrive at once, so its load cannot be scaled")
    work = work_of(workload, setup)
    factor = work.utilisation(len(setup.replicas), workload.span_s) / utilisation
    scaled = time_scaled(workload, factor)
    note = (
        f"time x {factor:.3g} for a utilisation of {utilisation:.0%}: {len(workload.requests)} requests "
        f"in {scaled.span_s:.0f} s, {work.busy_s / len(workload.requests):.2f} replica-seconds each, "
        f"{work.prefill_share:.0%} of them prefill, with {work.running_share:.0%} of the memory for "
        f"{work.batch:.0f} running sequences a replica and {work.hit_share:.0%} hits in the rest"
    )
    return replace(scaled, notes=(*scaled.notes, note))


def num_blocks(setup: SimSetup) -> int:
    """KV blocks of the whole fleet."""
    return sum(replica.num_blocks for replica in setup.replicas)


def _same_kind(one: SimReplica, other: SimReplica) -> bool:
    return replace(one, name="", region="") == replace(other, name="", region="")
