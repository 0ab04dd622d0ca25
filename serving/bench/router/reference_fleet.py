"""The replica that is simulated unless another is given, and where its figures come from.

Qwen3-32B (its public config.json) in bfloat16 on two H100 SXM, the replica of llm-d's published
prefix-routing runs (8 pods of 2 H100, Qwen-32B; about 307k KV tokens a pod, which is also what is left
of 2 x 80 GB at 92 % beside 66 GB of weights at 256 KiB of KV a token).

NVIDIA's data sheet gives 989.4 TFLOP/s (bfloat16, dense) and 3.35 TB/s a GPU. Of these we take
0.5 and 0.8, and 2 ms a step for all-reduces and the host. That is 15,850 prefill tokens a second;
llm-d configures its load estimate with 15,928.
"""

from __future__ import annotations

from itertools import combinations

from cluster.load import StepCoefficients
from serving.engine.machine import Machine
from serving.engine.step_time import roofline_prior
from serving.model_spec import ModelSpec
from serving.simulator import SimReplica, SimSetup

BLOCK_TOKENS = 64
KV_TOKENS = 600 * 512
MAX_STEP_TOKENS = 2048
MAX_NUM_SEQS = 256
MAX_CONTEXT_TOKENS = 1 << 17

_BF16_BYTES = 2
_NUM_GPUS = 2
_H100_FLOPS_PER_S, _COMPUTE_EFFICIENCY = 989.4e12, 0.5
_H100_BYTES_PER_S, _MEMORY_EFFICIENCY = 3.35e12, 0.8
_STEP_OVERHEAD_MS = 2.0

QWEN3_32B = ModelSpec(
    architecture="Qwen3ForCausalLM",
    num_layers=64,
    hidden_size=5120,
    num_heads=64,
    num_kv_heads=8,
    head_dim=128,
    intermediate_size=25600,
    vocab_size=151936,
    context_tokens=MAX_CONTEXT_TOKENS,
    rope_theta=1e6,
    rope_scaling=None,
    rms_norm_eps=1e-6,
    tie_word_embeddings=False,
    bos_token_id=None,
    eos_token_ids=(151645,),
)

REGION_NAMES = ("us-east", "eu-west", "ap-south")
REGION_RTT_MS = {("us-east", "eu-west"): 80.0, ("us-east", "ap-south"): 200.0, ("eu-west", "ap-south"): 120.0}
"""Typical medians between public clouds' regions of these names (Virginia, Ireland, Mumbai)."""


def reference_step() -> StepCoefficients:
    """The roofline of the replica above."""
    machine = Machine(
        flops_per_s=_NUM_GPUS * _H100_FLOPS_PER_S * _COMPUTE_EFFICIENCY,
        bytes_per_s=_NUM_GPUS * _H100_BYTES_PER_S * _MEMORY_EFFICIENCY,
        step_overhead_ms=_STEP_OVERHEAD_MS,
    )
    return roofline_prior(QWEN3_32B, machine, weight_bytes=_BF16_BYTES, kv_bytes=_BF16_BYTES)


def fleet(
    num_replicas: int,
    regions: tuple[str, ...],
    *,
    block_tokens: int = BLOCK_TOKENS,
    kv_tokens: int = KV_TOKENS,
    num_routers: int = 1,
    staleness_ms: float = 0.0,
    seed: int = 0,
) -> SimSetup:
    """So many reference replicas, dealt out to the regions in turn; each region has `num_routers`."""
    step = reference_step()
    replicas = tuple(
        SimReplica(
            name=f"replica-{number}",
            region=regions[number % len(regions)],
            num_blocks=kv_tokens // block_tokens,
            step=step,
            max_step_tokens=MAX_STEP_TOKENS,
            max_num_seqs=MAX_NUM_SEQS,
            max_context_tokens=MAX_CONTEXT_TOKENS,
        )
        for number in range(num_replicas)
    )
    several = len(regions) > 1
    return SimSetup(
        replicas=replicas,
        block_tokens=block_tokens,
        rtt_ms={pair: _rtt_ms(*pair) for pair in combinations(regions, 2)},
        num_routers=num_routers * len(regions),
        router_regions=tuple(regions) * num_routers if several else (),
        staleness_ms=staleness_ms,
        seed=seed,
    )


def _rtt_ms(one: str, other: str) -> float:
    return REGION_RTT_MS.get((one, other)) or REGION_RTT_MS[other, one]
