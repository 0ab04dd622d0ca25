"""What a replica says of its own room, in KV blocks and predicted milliseconds."""

from __future__ import annotations

import msgspec

TOKEN_KNOTS = (4, 16, 64)
"""Where a step's cost a token may change: up to some batch the weights' bytes bind, beyond it FLOPs."""


class StepCoefficients(msgspec.Struct, frozen=True, array_like=True):
    """A step's predicted milliseconds, of its sizes; every coefficient is 0 or more.

        base + tokens' cost + per_kv_token * kv_tokens + per_logit * num_logits + per_pair * attention_pairs

    `tokens` is the number of new tokens in the step (prefill and decode alike); their cost is linear
    between the knots: the first 4, the next 12 and the next 48 of them take `small_token_ms[0..2]` each,
    all further ones `per_token_ms` (all of them, without `small_token_ms`). `kv_tokens` is the context
    tokens whose keys and values the step reads, `num_logits` the tokens it draws, and `attention_pairs`
    the pairs of a new token with one of its context.
    """

    base_ms: float
    per_token_ms: float
    per_kv_token_ms: float
    per_logit_ms: float = 0.0
    per_pair_ms: float = 0.0
    small_token_ms: tuple[float, ...] = ()

    def predict_ms(
        self, tokens: int, kv_tokens: int, num_logits: int = 0, attention_pairs: float = 0.0
    ) -> float:
        ms = self.base_ms + self.per_kv_token_ms * kv_tokens
        ms += self.per_logit_ms * num_logits + self.per_pair_ms * attention_pairs
        counted = 0
        for knot, token_ms in zip(TOKEN_KNOTS, self.small_token_ms, strict=False):
            if tokens <= knot:
                return ms + token_ms * (tokens - counted)
            ms += token_ms * (knot - counted)
            counted = knot
        return ms + self.per_token_ms * (tokens - counted)

    def decode_ms(self, batch_size: int, kv_tokens: int) -> float:
        """A step in which so many sequences, with so many context tokens in all, get a token each."""
        return self.predict_ms(batch_size, kv_tokens, batch_size, kv_tokens)


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
    max_num_seqs: int  # sequences that run at one time at most
    num_observations: int  # timed steps that `step` is learned from
    draining: bool = False
    asleep: bool = False  # its memory is given back: the next request wakes it, and waits for that

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
