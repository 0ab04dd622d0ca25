"""The routing policy: which replica has room for a request, and where it costs everybody least. Pure.

Room is counted in blocks, and comes first:

    headroom = free + evictable - reserved - dispatched and unreported - demand of the request
    demand   = ceil((prompt + expected new tokens) / block_tokens), at most the pool

`reserved` is what the replica has promised or foresees that its running sequences will need
(`engine.growth`). A prefix match shortens the work, never the demand: matched blocks stop being
evictable the moment they are used. Admissible replicas have headroom >= 0.

Among them the least milliseconds win, and all of them are the same milliseconds, so nothing is weighted:

    wait   = what is under way + prefill backlog + wait for a seat    until the first chunk can run
    work   = uncached tokens * T(chunk) / chunk + the context that they read again
    own    = round trip + wait + work                                 the request's time to first token
    later  = work * rate * (wait + work) / (1 - u)                    of those who come while it is busy
    decode = running * (work - steps * T(no prefill)) / new tokens    of those who decode, a token
    evict  = evicted blocks * reuse * T(chunk) / chunk                work that is done again for others
    move   = round trip * reuse / (1 - reuse)                         of the turns that will follow there
    score  = own + later + decode + evict + move + egress

`T` is the replica's own step-time model; `rate` (requests that come to a replica), `u` (the share of its
time that prefill takes) and `reuse` (the share of prompt blocks found cached) are measured. `later` is
the externality of work in a queue (Haviv and Ritov 1998): all who come before the replica has caught up,
`(wait + work) / (1 - u)` from now, wait that much longer. At low load the nearest idle replica wins, near
saturation the one that saves work does. What every candidate has cached cancels out.

Scores that differ by less than their noise are equal: of two equal ones drawn at random, the one with
more room wins, so that a burst, or routers that know nothing of each other, spread. Noise is the step
under way, of which nobody knows how much is over, the prediction's error, and what a report's age leaves
open: the work that others bring there meanwhile, at the rate at which they were seen to.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serving.messages import Overloaded, Route, RouteRequest

Floats = NDArray[np.floating[Any]]
Ints = NDArray[np.integer[Any]]
Bools = NDArray[np.bool_]

PERMANENT_RETRY_S = 0.0
"""What `retry_after_s` says where trying again cannot help."""

MOST_BUSY = 0.95
"""Shares above it are taken as this: a replica that is busier catches up all the same."""

ASK_AGAIN_MS = 20.0
"""What a refusal costs beside the round trip, and a step's doubt: less is not worth it."""

STEP_DEVIATION = 12**-0.5
"""How much of the step under way is over nobody knows: it is spread evenly."""

PREDICTION_ERROR = 0.05
"""Of the step-time model, as a part of the work by which two replicas differ: what is equal errs alike."""


@dataclass(frozen=True, slots=True)
class Replicas:
    """Every known replica, one a row, by its last report and what was dispatched since: arrays [R]."""

    ids: list[str | None]  # None: an empty row
    regions: list[str]
    blocks_total: Ints
    room_blocks: Ints  # but for the request's demand
    free_blocks: Ints  # of them, such as hold nothing that could be asked for again
    busy_until_s: Floats  # unix time at which its prefill backlog is worked off
    token_ms: Floats  # of a prefill token, beside the decodes that run
    step_ms: Floats  # of a step without prefill
    kv_token_ms: Floats  # of a context token read
    pair_ms: Floats
    chunk_tokens: Ints
    running: Ints  # sequences accepted and dispatched
    seats: Ints  # sequences that run at one time at most
    rtt_ms: Floats
    egress_ms: Floats


@dataclass(frozen=True, slots=True)
class Candidates:
    """Which of them may take a request, and what has become of their figures since they told them: [R]."""

    serves: Bools  # has the model, in an allowed region
    is_open: Bools  # takes new work: neither draining, nor held, nor silent, nor a refuser
    is_doubted: Bools
    wait_ms: Floats
    noise_ms: Floats  # of `wait_ms`: what others may have brought unseen


@dataclass(frozen=True, slots=True)
class Traffic:
    """What was measured of a model's requests lately."""

    busy: float = 0.0  # u: share of the replicas' time that prefill takes
    reuse: float = 0.0
    mean_work_ms: float = 0.0
    others_per_s: float = 0.0  # requests that other Routers bring to a replica
    per_replica_s: float = 0.0  # requests that come to a replica


@dataclass(frozen=True, slots=True)
class Prompt:
    """A request in tokens and blocks."""

    tokens: int
    new_tokens: int  # expected
    block_tokens: int

    @property
    def demand_blocks(self) -> int:
        return -(-(self.tokens + self.new_tokens) // self.block_tokens)


@dataclass(frozen=True, slots=True)
class NoHeadroom:
    """No replica can take the request now; one may later."""

    why: str


@dataclass(frozen=True, slots=True)
class Scores:
    """The formula's sums: arrays [R] of ms."""

    wait: Floats
    work: Floats
    own: Floats
    total: Floats


def pick(
    request: RouteRequest,
    prompt: Prompt,
    replicas: Replicas,
    candidates: Candidates,
    matched_blocks: Ints,
    traffic: Traffic,
    rng: random.Random,
) -> Route | Overloaded | NoHeadroom:
    """The replica for `request`, or why there is none. Overloaded is always permanent here."""
    if not candidates.serves.any():
        return NoHeadroom(why=f"no replica of {request.model} is reporting")
    fits_pool = candidates.serves & (prompt.tokens + 1 <= replicas.blocks_total * prompt.block_tokens)
    if not fits_pool.any():
        return _too_large(request, prompt, int(replicas.blocks_total[candidates.serves].max()))
    demand = np.minimum(prompt.demand_blocks, replicas.blocks_total)
    headroom = replicas.room_blocks - demand
    usable = candidates.is_open & fits_pool
    admissible = usable & (headroom >= 0)
    fresh = admissible & ~candidates.is_doubted
    rivals = np.flatnonzero(fresh if fresh.any() else admissible)
    if len(rivals) == 0:
        return NoHeadroom(why=_why_none(request, headroom[usable], int(candidates.serves.sum())))
    scores = score(prompt, replicas, candidates.wait_ms, matched_blocks, traffic)
    best = _choose(scores, rivals, headroom, candidates.noise_ms + _step_noise_ms(replicas), rng)
    return Route(
        request_id=request.request_id,
        replica_id=str(replicas.ids[best]),
        region=replicas.regions[best],
        reserve_blocks=int(demand[best]),
        matched_blocks=int(matched_blocks[best]),
        predicted_ms=float(scores.own[best]),
        work_ms=float(scores.work[best]),
        max_backlog_tokens=_most_backlog(best, rivals, replicas, candidates, scores),
        why=f"round trip {replicas.rtt_ms[best]:.0f} + wait {scores.wait[best]:.0f} + work "
        f"{scores.work[best]:.0f} ms, {scores.total[best] - scores.own[best]:.0f} ms for others, "
        f"{headroom[best]} blocks left, best of {len(rivals)} with headroom",
    )


def score(
    prompt: Prompt, replicas: Replicas, wait_ms: Floats, matched_blocks: Ints, traffic: Traffic
) -> Scores:
    """Milliseconds for the request and for all others, by the formula at the top."""
    r = replicas
    # The last token is always computed.
    tokens = np.maximum(1, prompt.tokens - matched_blocks * prompt.block_tokens)
    steps = np.ceil(tokens / r.chunk_tokens)
    read_back = r.kv_token_ms * tokens * (steps + 1) / 2 + r.pair_ms * tokens * (prompt.tokens - tokens / 2)
    work = tokens * r.token_ms + read_back
    # Seats come free as answers end: one in so many steps of each sitter.
    ahead = np.maximum(0, r.running + 1 - r.seats)
    wait = wait_ms + ahead * (prompt.new_tokens * r.step_ms) / r.seats
    own = r.rtt_ms + wait + work
    idle = 1 - min(traffic.busy, MOST_BUSY)
    later = work * (traffic.per_replica_s / 1000) * (wait + work) / idle
    decode = r.running * np.maximum(0.0, work - steps * r.step_ms) / prompt.new_tokens
    evicted = np.maximum(0, prompt.demand_blocks - matched_blocks - r.free_blocks)
    evict = evicted * (traffic.reuse * prompt.block_tokens) * r.token_ms
    reuse = min(traffic.reuse, MOST_BUSY)
    move = r.rtt_ms * reuse / (1 - reuse)
    return Scores(wait, work, own, own + later + decode + evict + move + r.egress_ms)


def drain_ms(blocks: int, new_tokens: int, replicas: Replicas, serves: Bools) -> float | None:
    """Predicted milliseconds until these replicas release `blocks`; None where nothing runs.

    Little's law: a sequence stays for its output's steps, so a replica with `u` blocks in use
    releases `u / (new_tokens * step_ms)` of them a millisecond.
    """
    used = np.maximum(0, replicas.blocks_total - replicas.room_blocks)[serves]
    blocks_per_ms = float((used / np.maximum(1.0, new_tokens * replicas.step_ms[serves])).sum())
    return blocks / blocks_per_ms if blocks_per_ms > 0 else None


def _choose(scores: Scores, rivals: Ints, headroom: Ints, noise_ms: Floats, rng: random.Random) -> int:
    totals = scores.total[rivals]
    first = rivals[int(totals.argmin())]
    work = scores.work[rivals]
    noise = 1.0 + PREDICTION_ERROR * abs(work - scores.work[first]) + noise_ms[rivals] + noise_ms[first]
    equals = rivals[totals <= scores.total[first] + noise]
    if len(equals) == 1:
        return int(first)
    one, other = rng.randrange(len(equals)), rng.randrange(len(equals))
    return int(max(equals[one], equals[other], key=lambda row: headroom[row]))


def _most_backlog(
    best: int, rivals: Ints, replicas: Replicas, candidates: Candidates, scores: Scores
) -> int | None:
    """The prefill at which the next best replica would be the better one, by more than asking costs.

    A view is old when it is used; the replica knows better, and says so (`Refused.is_busy`). So what
    others may have brought it is no excuse here, as it is when two views are compared.
    """
    others = rivals[rivals != best]
    if len(others) == 0:
        return None
    margin_ms = max(0.0, float(scores.total[others].min() - scores.total[best]))
    ask_again_ms = ASK_AGAIN_MS + replicas.rtt_ms[best] + _step_noise_ms(replicas)[best]
    return int((candidates.wait_ms[best] + margin_ms + ask_again_ms) / replicas.token_ms[best])


def _step_noise_ms(replicas: Replicas) -> Floats:
    return STEP_DEVIATION * replicas.step_ms * (replicas.running > 0)


def _too_large(request: RouteRequest, prompt: Prompt, most_blocks: int) -> Overloaded:
    largest = most_blocks * prompt.block_tokens
    return Overloaded(
        request_id=request.request_id,
        retry_after_s=PERMANENT_RETRY_S,
        permanent=True,
        why=f"the prompt has {prompt.tokens} tokens, and the largest KV cache of a replica that may serve "
        f"it holds {largest}, one of them for the answer: send at most {largest - 1} tokens",
    )


def _why_none(request: RouteRequest, headroom: Ints, serving: int) -> str:
    if len(headroom) == 0:
        return f"none of {serving} replicas of {request.model} takes this request now"
    return f"no replica of {request.model} has room: the nearest is short of {-int(headroom.max())} KV blocks"
