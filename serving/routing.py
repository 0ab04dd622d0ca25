"""The routing policy: which replica has room for a request, and is soonest with it. Pure.

    headroom_blocks = free + evictable - reserved - dispatched and unreported - demand of the request
    demand_blocks   = ceil((prompt + min(expected new, max new)) / block_tokens), at most the pool

Admissible replicas have headroom >= 0. Among them the least predicted milliseconds to the first
token wins, then the most headroom, then the one that was routed to longest ago (so equal replicas
take turns). A prefix match shortens the work, never the demand: the matched blocks stop being
evictable the moment they are used, so they leave `evictable` as they leave the demand.

    c          = max_step_tokens - running               tokens of prefill that fit in a step
    T(m)       = step time of the running decodes beside m tokens of prefill
    under_way  = T(0) while anything runs, else 0        the step that is on the GPU now
    prefill(n) = floor(n / c) * T(c) + T(n mod c)        the last only where there is a rest

    read_back  = per_kv_token_ms * p * (chunks of p + 1) / 2 + per_pair_ms * p * (prompt - p / 2)
    predicted  = rtt_ms + under_way + prefill(backlog + p) + read_back
    wait_ms    = under_way + prefill(backlog)            the rest, but for the round trip, is work

`p` is the prompt without its matched blocks, `backlog` the prompt tokens the replica has not run
yet, dispatched ones included; `read_back` is the context that p's own chunks read again.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from cluster.load import ReplicaLoad
from serving.messages import Overloaded, Route, RouteRequest

GROWTH_TOKENS = 256
"""Expected output of a request whose length nobody has told: a prior, kept until one is learned."""

PERMANENT_RETRY_S = 0.0
"""What `retry_after_s` says where trying again cannot help."""


@dataclass(frozen=True, slots=True)
class ReplicaView:
    """One replica as it is seen at the moment of a pick."""

    load: ReplicaLoad
    rtt_ms: float
    age_s: float = 0.0  # since its last report came in
    dispatched_blocks: int = 0  # demand of Routes that `load` does not include yet
    dispatched_tokens: int = 0  # prompt tokens of the same Routes
    dispatched_requests: int = 0
    matched_blocks: int = 0  # of this request's prompt, held in the replica's prefix cache
    last_routed: int = 0  # running number of the last Route to it, 0 for none
    held: bool = False  # an earlier waiting request could use it, so a later one may not


@dataclass(frozen=True, slots=True)
class FleetLoad:
    """Every replica in the running set that has reported, whatever its model or region."""

    replicas: tuple[ReplicaView, ...]
    block_tokens: int = 16
    stale_after_s: float = 3.0  # an older report is doubted: used when no fresh one has headroom
    drop_after_s: float = 10.0  # an older one is not used


@dataclass(frozen=True, slots=True)
class NoHeadroom:
    """No replica can take the request now; one may later."""

    why: str


def growth_prior(max_tokens: int) -> int:
    """New tokens to reserve for, when nothing is known of the output but its limit."""
    return min(max_tokens, GROWTH_TOKENS)


def pick(request: RouteRequest, fleet: FleetLoad) -> Route | Overloaded | NoHeadroom:
    """The replica for `request`, or why there is none. Overloaded is always permanent here."""
    serving = [view for view in fleet.replicas if serves(view.load, request)]
    if serving and not any(_fits_pool(view.load, request, fleet.block_tokens) for view in serving):
        return _too_large(request, serving, fleet.block_tokens)
    usable = [view for view in serving if _usable(view, request, fleet)]
    room = {view.load.replica_id: headroom_blocks(view, request, fleet.block_tokens) for view in usable}
    admissible = [view for view in usable if room[view.load.replica_id] >= 0]
    if not admissible:
        return NoHeadroom(why=_why_none(request, serving, room))

    def preference(view: ReplicaView) -> tuple[bool, int, int, int, str]:
        replica_id = view.load.replica_id
        doubted = view.age_s > fleet.stale_after_s
        whole_ms = round(predicted_ms(view, request, fleet.block_tokens))  # less than 1 ms is noise
        return (doubted, whole_ms, -room[replica_id], view.last_routed, replica_id)

    best = min(admissible, key=preference)
    return _route(best, request, fleet.block_tokens, room[best.load.replica_id], len(admissible))


def demand_blocks(request: RouteRequest, block_tokens: int, pool_blocks: int) -> int:
    """Blocks to reserve for the prompt and its expected growth, at most a pool of `pool_blocks`."""
    growth = min(request.expected_new_tokens, request.max_tokens)
    return min(_ceil_div(request.prompt_tokens + growth, block_tokens), pool_blocks)


def headroom_blocks(view: ReplicaView, request: RouteRequest, block_tokens: int) -> int:
    """Blocks that would be left on this replica with `request` on it; negative is a refusal."""
    demand = demand_blocks(request, block_tokens, view.load.blocks_total)
    return view.load.room_blocks - view.dispatched_blocks - demand


def predicted_ms(view: ReplicaView, request: RouteRequest, block_tokens: int) -> float:
    """Predicted milliseconds until the request's first token, the way there included."""
    tokens = max(1, request.prompt_tokens - view.matched_blocks * block_tokens)  # the last is always computed
    chunks = _ceil_div(tokens, _chunk_tokens(view))
    pairs = tokens * (request.prompt_tokens - tokens / 2)  # with the matched tokens and those before it
    step = view.load.step
    read_back = step.per_kv_token_ms * tokens * (chunks + 1) / 2 + step.per_pair_ms * pairs
    return view.rtt_ms + _under_way_ms(view) + _prefill_ms(view, _backlog_tokens(view) + tokens) + read_back


def wait_ms(view: ReplicaView) -> float:
    """Of that, the milliseconds before its first chunk: the step under way and the backlog."""
    return _under_way_ms(view) + _prefill_ms(view, _backlog_tokens(view))


def drain_ms(blocks: int, expected_new_tokens: int, views: Iterable[ReplicaView]) -> float | None:
    """Predicted milliseconds until these replicas release `blocks`; None where nothing runs.

    Little's law: a sequence stays for its output's steps, so a replica with `u` blocks in use
    releases `u / (expected_new_tokens * step_ms)` of them a millisecond.
    """
    blocks_per_ms = 0.0
    for view in views:
        used = view.load.blocks_total - view.load.room_blocks + view.dispatched_blocks
        stay_ms = max(1.0, expected_new_tokens * _chunk_ms(view))
        blocks_per_ms += max(0, used) / stay_ms
    return blocks / blocks_per_ms if blocks_per_ms > 0 else None


def serves(load: ReplicaLoad, request: RouteRequest) -> bool:
    """Whether this replica has the request's model, in a region the request may go to."""
    allowed = not request.allowed_regions or load.region in request.allowed_regions
    return load.model == request.model and allowed


def _usable(view: ReplicaView, request: RouteRequest, fleet: FleetLoad) -> bool:
    closed = view.held or view.load.draining or view.age_s > fleet.drop_after_s
    refused = view.load.replica_id in request.refused_replicas
    return not closed and not refused and _fits_pool(view.load, request, fleet.block_tokens)


def _fits_pool(load: ReplicaLoad, request: RouteRequest, block_tokens: int) -> bool:
    return request.prompt_tokens + 1 <= load.blocks_total * block_tokens


def _running(view: ReplicaView) -> int:
    return view.load.num_running + view.dispatched_requests


def _backlog_tokens(view: ReplicaView) -> int:
    return view.load.prefill_backlog_tokens + view.dispatched_tokens


def _chunk_tokens(view: ReplicaView) -> int:
    return max(1, view.load.max_step_tokens - _running(view))


def _under_way_ms(view: ReplicaView) -> float:
    return _chunk_ms(view) if _running(view) else 0.0


def _chunk_ms(view: ReplicaView, prefill_tokens: int = 0) -> float:
    """A step of the running decodes, beside so many tokens of prefill."""
    kv_tokens, running = view.load.decode_kv_tokens, _running(view)
    return view.load.step.predict_ms(running + prefill_tokens, kv_tokens, running, kv_tokens)


def _prefill_ms(view: ReplicaView, tokens: int) -> float:
    full, rest = divmod(tokens, _chunk_tokens(view))
    return full * _chunk_ms(view, _chunk_tokens(view)) + (_chunk_ms(view, rest) if rest else 0.0)


def _ceil_div(dividend: int, divisor: int) -> int:
    return -(-dividend // divisor)


def _route(view: ReplicaView, request: RouteRequest, block_tokens: int, room: int, rivals: int) -> Route:
    total_ms = predicted_ms(view, request, block_tokens)
    waiting_ms = wait_ms(view)
    work = total_ms - waiting_ms - view.rtt_ms
    return Route(
        request_id=request.request_id,
        replica_id=view.load.replica_id,
        region=view.load.region,
        reserve_blocks=demand_blocks(request, block_tokens, view.load.blocks_total),
        matched_blocks=view.matched_blocks,
        predicted_ms=total_ms,
        why=f"round trip {view.rtt_ms:.0f} + wait {waiting_ms:.0f} + work {work:.0f} ms, "
        f"{room} blocks left, best of {rivals} with headroom",
    )


def _too_large(request: RouteRequest, serving: list[ReplicaView], block_tokens: int) -> Overloaded:
    largest = max(view.load.blocks_total for view in serving) * block_tokens
    return Overloaded(
        request_id=request.request_id,
        retry_after_s=PERMANENT_RETRY_S,
        permanent=True,
        why=f"the prompt has {request.prompt_tokens} tokens, and the largest KV cache of a replica that "
        f"may serve it holds {largest}, one of them for the answer: send at most {largest - 1} tokens",
    )


def _why_none(request: RouteRequest, serving: list[ReplicaView], room: dict[str, int]) -> str:
    if not serving:
        return f"no replica of {request.model} is reporting"
    if not room:
        return f"none of {len(serving)} replicas of {request.model} takes this request now"
    return f"no replica of {request.model} has room: the nearest is short of {-max(room.values())} KV blocks"
