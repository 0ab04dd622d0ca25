"""What a replica says of its own room, in KV blocks and predicted milliseconds."""

from __future__ import annotations

import msgspec


class StepCoefficients(msgspec.Struct, frozen=True, array_like=True):
    """A step's predicted milliseconds: `base + per_token * tokens + per_kv_token * kv_tokens`.

    `tokens` is the number of new tokens in the step (prefill and decode alike), `kv_tokens` the
    context tokens whose keys and values the step reads.
    """

    base_ms: float
    per_token_ms: float
    per_kv_token_ms: float

    def predict_ms(self, tokens: int, kv_tokens: int) -> float:
        return self.base_ms + self.per_token_ms * tokens + self.per_kv_token_ms * kv_tokens


class ReplicaLoad(msgspec.Struct, frozen=True, kw_only=True):
    """One replica's load at one instant. Replicas push it; `epoch` and `sequence` order the reports.

    Blocks: `free` were never used or have no hash, `evictable` are cached with no reader,
    `reserved` are promised to accepted requests and not yet allocated. What a new request can
    count on is `free + evictable - reserved`.
    """

    replica_id: str
    model: str
    region: str
    epoch: int  # changes when the replica's process does
    sequence: int  # grows by one a report within an epoch
    last_submission: int  # number of the last accepted submission that these figures include
    blocks_total: int
    blocks_free: int
    blocks_evictable: int
    blocks_reserved: int
    num_running: int
    num_waiting: int
    prefill_backlog_tokens: int
    decode_kv_tokens: int  # context tokens of the sequences now decoding
    step: StepCoefficients
    max_step_tokens: int
    draining: bool = False

    @property
    def room_blocks(self) -> int:
        """Blocks a new request may claim now. Negative when reservations outgrew the pool."""
        return self.blocks_free + self.blocks_evictable - self.blocks_reserved


class RegionLoad(msgspec.Struct, frozen=True, kw_only=True):
    """The sum over a region's replicas, for status and for the autoscaler's signals."""

    region: str
    num_replicas: int
    blocks_total: int
    room_blocks: int
    num_running: int
    num_waiting: int
    prefill_backlog_tokens: int


def by_region(loads: list[ReplicaLoad]) -> list[RegionLoad]:
    """Sum replicas' loads a region, sorted by region name."""
    regions = sorted({load.region for load in loads})
    return [_sum(region, [load for load in loads if load.region == region]) for region in regions]


def _sum(region: str, loads: list[ReplicaLoad]) -> RegionLoad:
    return RegionLoad(
        region=region,
        num_replicas=len(loads),
        blocks_total=sum(load.blocks_total for load in loads),
        room_blocks=sum(load.room_blocks for load in loads),
        num_running=sum(load.num_running for load in loads),
        num_waiting=sum(load.num_waiting for load in loads),
        prefill_backlog_tokens=sum(load.prefill_backlog_tokens for load in loads),
    )
