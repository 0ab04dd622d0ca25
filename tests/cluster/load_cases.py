"""The load report that tests of whoever reads one start from."""

import msgspec

from cluster.load import ReplicaLoad, StepCoefficients


def a_load(replica_id: str = "r0", **changes: object) -> ReplicaLoad:
    """An idle replica of 100 blocks, 5 ms a step and 0.1 ms a token, but for `changes`."""
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
