"""How many replicas a model needs in a region: memory and compute, whichever asks for more. Pure.

    n = max(n_kv, n_flops), each rounded up

    n_kv    = (blocks in use or reserved + blocks that queued requests want) / (rho_kv * blocks a replica)

    n_flops = (prompt tokens/s * t_prefill + output tokens/s * t_decode) / rho_compute
    t_prefill = seconds a prompt token takes in a full step beside the present decodes
    t_decode  = seconds an output token takes at the largest batch that still meets the target TPOT

`prompt tokens/s` holds the arrivals and the backlog, spread over the time it should be gone in. The
first is Little's law on resident KV, the second the utilisation law on step time: a replica can be
full of long idle contexts while its GPU rests, or bound by prefill with its cache half empty, so
neither percentage alone can size it.
"""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass
from typing import Literal

from cluster.load import ReplicaLoad


@dataclass(frozen=True, slots=True)
class Targets:
    """How full a replica should be run."""

    kv_utilisation: float = 0.8  # rho_kv
    compute_utilisation: float = 0.7  # rho_compute; queueing time grows without bound towards 1
    backlog_drain_s: float = 10.0
    tpot_ms: float = 50.0  # milliseconds between two tokens of one stream


@dataclass(frozen=True, slots=True)
class Demand:
    """What one model is asked for in one region, and what its replicas there report."""

    loads: tuple[ReplicaLoad, ...]
    queued_blocks: int = 0  # demand of requests no replica has accepted yet
    queued_prompt_tokens: int = 0
    prompt_tokens_per_s: float = 0.0  # arriving, prefix hits left out
    output_tokens_per_s: float = 0.0


@dataclass(frozen=True, slots=True)
class ReplicasNeeded:
    n: int
    binding: Literal["kv", "flops"]
    why: str


def replicas_needed(demand: Demand, targets: Targets | None = None) -> ReplicasNeeded:
    """The least number of replicas like the present ones that keeps within `targets`.

    Draining replicas are neither capacity nor demand: what runs there ends there. Without any
    report nothing can be sized, so the answer is one replica where anything is asked for; holding
    what there is while reports are missing is the caller's policy.
    """
    targets = targets or Targets()
    loads = [load for load in demand.loads if not load.draining]
    if not loads:
        asked = demand.queued_blocks > 0 or demand.prompt_tokens_per_s > 0 or demand.output_tokens_per_s > 0
        return ReplicasNeeded(int(asked), "kv", "no replica reports its size yet")
    kv, flops = _kv_replicas(demand, loads, targets), _busy_replicas(demand, loads, targets)
    why = f"KV blocks ask for {kv:.2f} replicas, step time for {flops:.2f}"
    if kv >= flops:
        return ReplicasNeeded(_ceil(kv), "kv", why)
    return ReplicasNeeded(_ceil(flops), "flops", why)


def _kv_replicas(demand: Demand, loads: list[ReplicaLoad], targets: Targets) -> float:
    wanted = sum(load.blocks_total - load.room_blocks for load in loads) + demand.queued_blocks
    a_replica = sum(load.blocks_total for load in loads) / len(loads)
    return max(0, wanted) / (targets.kv_utilisation * a_replica)


def _busy_replicas(demand: Demand, loads: list[ReplicaLoad], targets: Targets) -> float:
    backlog_tokens = sum(load.prefill_backlog_tokens for load in loads) + demand.queued_prompt_tokens
    prompt_tokens_per_s = demand.prompt_tokens_per_s + backlog_tokens / targets.backlog_drain_s
    prefill_ms = sum(_prefill_token_ms(load) for load in loads) / len(loads)
    decode_ms = sum(_decode_token_ms(load, targets.tpot_ms) for load in loads) / len(loads)
    busy = (prompt_tokens_per_s * prefill_ms + demand.output_tokens_per_s * decode_ms) / 1000
    return busy / targets.compute_utilisation


def _prefill_token_ms(load: ReplicaLoad) -> float:
    """A full step's time over its tokens."""
    kv_tokens = load.decode_kv_tokens
    return load.step.predict_ms(load.max_step_tokens, kv_tokens, 0, kv_tokens) / load.max_step_tokens


def _decode_token_ms(load: ReplicaLoad, tpot_ms: float) -> float:
    """A decode step's time over its sequences, at the largest batch whose step meets `tpot_ms`.

    The contexts are as long as those now decoding are on average. A present batch of 1 would charge each
    token a whole read of the weights.
    """
    context_tokens = load.decode_kv_tokens / load.num_running if load.num_running else 0.0

    def step_ms(batch: int) -> float:
        return load.step.decode_ms(batch, math.floor(batch * context_tokens))

    batches = range(1, load.max_step_tokens + 1)
    batch = max(1, bisect.bisect_right(batches, tpot_ms, key=step_ms))
    return step_ms(batch) / batch


def _ceil(replicas: float) -> int:
    """Rounded up; a rounding error of the division is not another replica."""
    return math.ceil(replicas - 1e-9)
