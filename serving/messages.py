"""Every message between the stages of a request's way, and their one encoding.

    Ingress ──RouteRequest──► Router ──Route | Queued | Overloaded──► Ingress
    Ingress ──DispatchUpdate──► Router          what became of a Route
    Ingress ──Submit──► ModelReplica ──Accepted | Refused──► Ingress
    rank 0 ──StepFrame──► ModelReplica ──StepFrame (its part)──► Ingress
    ModelReplica ──ReplicaReport──► Router      its load (cluster/load.py), its cache's news

Stages know only these. Lists of them travel as msgpack bytes, so that what crosses a process is
explicit, typed and never a pickle of our classes.
"""

from __future__ import annotations

from typing import Literal, TypeVar

import msgspec

from cluster.load import ReplicaLoad

FinishReason = Literal["stop", "length", "abort", "error", "lost"]  # lost: its replica is dying


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How one sequence's tokens are chosen.

    `temperature` 0 is greedy; `top_k` 0, `top_p` 1 and `min_p` 0 are off. `seed` is always set
    (Ingress draws one when the client gives none), so a sequence can be replayed anywhere.
    """

    max_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()


class Refusal(msgspec.Struct, frozen=True, array_like=True):
    """What a replica that refused a request said of itself: later than any report."""

    replica_id: str
    headroom_blocks: int
    backlog_tokens: int


class RouteRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What the Router may know of a request: sizes, hashes and limits, never text."""

    request_id: str
    ingress_id: str
    model: str
    tenant_key: str
    priority: int = 0  # lower is served first
    deadline_s: float  # unix time after which nobody waits for a Route any more
    prompt_tokens: int
    max_tokens: int
    block_hashes: tuple[bytes, ...] = ()
    allowed_regions: tuple[str, ...] = ()  # empty: any
    refused_replicas: tuple[str, ...] = ()  # replicas that have no room for this request, or died
    refusals: tuple[Refusal, ...] = ()  # since it was last asked for


class Route(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Submit to this replica, reserving `reserve_blocks` there."""

    request_id: str
    replica_id: str
    region: str
    reserve_blocks: int
    matched_blocks: int  # expected prefix match
    predicted_ms: float  # until its first token
    why: str
    work_ms: float = 0.0  # of them, the prefill of what is not cached
    max_backlog_tokens: int | None = None  # with more prefill before it, another replica is the better one


class Queued(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """No replica has headroom now; a Route or Overloaded follows on the Router's stream."""

    request_id: str
    position: int
    predicted_wait_ms: float


class Overloaded(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """No Route will come. `permanent`: no replica could ever hold this request."""

    request_id: str
    retry_after_s: float
    why: str
    permanent: bool = False


RouteReply = Route | Queued | Overloaded


class DispatchUpdate(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a Route, so that the Router counts each request's blocks once.

    `accepted` carries the replica's submission number: the Router's own note of the dispatch is
    dropped when a load report includes it. `finished` and `lost` end the request. `lost` without a
    request id says that the replica itself is gone, seen on its broken stream.
    """

    request_id: str
    replica_id: str
    outcome: Literal["accepted", "refused", "finished", "lost"]
    submission: int = 0
    output_tokens: int = 0
    is_whole: bool = True  # it ended by itself: neither its limit nor its client cut it off
    rtt_ms: float = 0.0  # measured on the way to `accepted`; 0 where it was not
    ttft_ms: float = 0.0  # told with `finished`; 0 where there was no token


class Submit(msgspec.Struct, frozen=True, kw_only=True):
    """One sequence for an engine, complete: it can be replayed from this and the tokens it emitted."""

    request_id: str
    token_ids: tuple[int, ...]
    sampling: SamplingParams
    reserve_blocks: int  # for the prompt and its expected growth, as if nothing matched; 0: only queue it
    hash_root: bytes  # root of the block-hash chain: model, weights, KV dtype and tenant salt
    max_backlog_tokens: int | None = None  # refuse where more prefill waits: None: however much does
    priority: int = 0
    traceparent: str | None = None


class Accepted(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    request_id: str
    submission: int  # the replica's running number; load reports name the last one they include
    reserved_blocks: int
    matched_blocks: int


class Refused(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """It cannot reserve what was asked, or is busier than the Router knew. An answer, not a failure."""

    request_id: str
    headroom_blocks: int
    why: str
    backlog_tokens: int = 0  # of prefill that waits there
    is_busy: bool = False  # it has the room: asked again without a limit it accepts
    permanent: bool = False  # larger than the whole pool, or than the model's context


SubmitReply = Accepted | Refused


class SequenceTimes(msgspec.Struct, frozen=True, array_like=True):
    """Where a sequence's time went, sent with its first token: milliseconds since it was accepted."""

    queue_ms: float  # until its first prefill chunk was scheduled
    prefill_ms: float  # from there to its first token
    cached_tokens: int  # prompt tokens found in the prefix cache


class SequenceDelta(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The news of one sequence in one step."""

    request_id: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    finish_reason: FinishReason | None = None
    error: str | None = None  # set with finish_reason "error"
    times: SequenceTimes | None = None


class StepStats(msgspec.Struct, frozen=True, kw_only=True):
    """What one step did, for metrics. Times in ms, FLOPs and bytes from the step-time model."""

    step_ms: float
    predicted_ms: float
    schedule_ms: float
    batch_size: int
    prefill_tokens: int
    decode_tokens: int
    flops: float
    bytes_moved: float
    floor_ms: float = 0.0  # the least such a step can take at the machine's measured rates
    ridge_flop_per_byte: float = 0.0  # of these: above this intensity compute binds, below it memory
    bound: Literal["memory", "compute"] = "memory"
    num_preemptions: int
    prefix_hit_tokens: int
    prefix_query_tokens: int
    host_hit_tokens: int = 0  # of the hits, those fetched from host memory


class BlockStored(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """A full block can be found from now on. `parent` is the hash before it, or the root."""

    block_hash: bytes
    parent: bytes


class BlockRemoved(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """A block was evicted, or is not to be trusted."""

    block_hash: bytes


BlockEvent = BlockStored | BlockRemoved


class BlockEvents(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A run of changes to a replica's set of cached blocks; the first of them has this number.

    Numbers grow by one an event within an epoch, so a consumer sees what it missed.
    """

    first_number: int
    events: tuple[BlockEvent, ...]


class BlockSnapshot(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Every cached block's hash, after the event of this number."""

    last_number: int
    block_hashes: tuple[bytes, ...]


class ReplicaReport(msgspec.Struct, frozen=True, kw_only=True):
    """What a replica tells the Router: its load, and what became of its cache since the last report.

    The Router answers whether it missed some before: then a snapshot is due.
    """

    load: ReplicaLoad
    blocks: tuple[BlockEvents | BlockSnapshot, ...] = ()


class StepFrame(msgspec.Struct, frozen=True, kw_only=True):
    """All of a step's news; the replica splits it so that each Ingress gets only its own requests.

    `next_step_ms` predicts the fullest step that could come next: with work to do, a silence many
    times longer is a hang. `block_events` is for the Router's index: no Ingress is sent any.
    """

    step: int
    deltas: tuple[SequenceDelta, ...] = ()
    load: ReplicaLoad | None = None
    stats: StepStats | None = None
    next_step_ms: float = 0.0
    block_events: BlockEvents | None = None


Message = TypeVar("Message")


def encode(messages: object) -> bytes:
    """Msgpack bytes of a message, or of a list of messages."""
    return msgspec.msgpack.encode(messages)


def decode(payload: bytes, kind: type[Message]) -> Message:
    """The message in `payload`; raises `msgspec.ValidationError` when it is not a `kind`."""
    return msgspec.msgpack.decode(payload, type=kind)
