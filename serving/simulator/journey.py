"""One simulated request under way: what its Ingress knows of it, and in the end what became of it."""

from __future__ import annotations

import math

from serving.engine.sequence import Sequence
from serving.messages import Refusal, RouteRequest
from serving.simulator.contract import MODEL, SimRequest
from serving.simulator.replica import SimulatedReplica
from serving.simulator.routers import SimulatedRouter


def route_request(
    request: SimRequest, refused: tuple[str, ...] = (), refusals: tuple[Refusal, ...] = ()
) -> RouteRequest:
    """What Ingress would tell the Router of this request."""
    return RouteRequest(
        request_id=str(request.number),
        ingress_id=f"ingress-{request.region}",
        model=MODEL,
        tenant_key=request.tenant,
        priority=request.priority,
        deadline_s=request.deadline_s,
        prompt_tokens=request.prompt_tokens,
        max_tokens=request.max_tokens,
        block_hashes=request.block_hashes,
        refused_replicas=refused,
        refusals=refusals,
    )


class Journey:
    """One request under way, and in the end what became of it."""

    __slots__ = (
        "attempt", "busy", "cached_tokens", "first_token_s", "last_token_s", "num_lost", "num_preemptions",
        "num_refusals", "num_submits", "outcome", "output_tokens", "queue_s", "refusals", "refused",
        "replica", "request", "router", "sequence", "travel_s", "was_routed",
    )  # fmt: skip

    def __init__(self, request: SimRequest) -> None:
        self.request = request
        self.router: SimulatedRouter | None = None  # asked last
        self.replica: SimulatedReplica | None = None  # that accepted it last
        self.sequence: Sequence | None = None  # on that replica, while it is there
        self.refused: tuple[str, ...] = ()
        self.refusals: tuple[Refusal, ...] = ()
        self.busy = 0  # replicas that were busier than the router knew
        self.attempt = 0  # changes with every question: older answers are not for it any more
        self.was_routed = False  # the Router may hold it, and no replica has taken it
        self.num_submits = self.num_lost = self.num_refusals = 0
        self.travel_s = 0.0  # to the router, back, and to the replica
        self.queue_s = self.first_token_s = self.last_token_s = math.nan
        self.output_tokens = self.cached_tokens = self.num_preemptions = 0  # of that sequence
        self.outcome = -1

    def left(self, sequence: Sequence) -> None:
        """Its replica has no more to do with it."""
        self.sequence = None
        self.output_tokens = sequence.num_outputs
        self.cached_tokens = sequence.cached_tokens
        self.num_preemptions = sequence.num_preemptions

    @property
    def is_over(self) -> bool:
        return self.outcome >= 0
