"""Loads, views and requests that tests of the routing policy start from."""

import msgspec

from cluster.load import ReplicaLoad, StepCoefficients
from serving.messages import RouteRequest

BLOCK_TOKENS = 16
PER_TOKEN_ONLY = StepCoefficients(0.0, 0.1, 0.0)


def a_load(replica_id: str = "r0", **changes: object) -> ReplicaLoad:
    idle = ReplicaLoad(
        replica_id=replica_id,
        model="m",
        region="us-east",
        epoch=1,
        sequence=1,
        last_submission=0,
        blocks_total=100,
        blocks_free=100,
        blocks_evictable=0,
        blocks_reserved=0,
        num_running=0,
        num_waiting=0,
        prefill_backlog_tokens=0,
        decode_kv_tokens=0,
        step=StepCoefficients(5.0, 0.1, 0.0),
        max_step_tokens=512,
        max_num_seqs=64,
        num_observations=1000,
    )
    return msgspec.structs.replace(idle, **changes)


def a_request(prompt_tokens: int = 160, **changes: object) -> RouteRequest:
    request = RouteRequest(
        request_id="q",
        ingress_id="ingress",
        model="m",
        tenant_key="t",
        deadline_s=1e9,
        prompt_tokens=prompt_tokens,
        max_tokens=64,
    )
    return msgspec.structs.replace(request, **changes)
