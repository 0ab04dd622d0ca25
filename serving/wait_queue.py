"""Requests that wait for room: lower priority numbers first, then fair shares, then arrival. Pure.

Requests with the same model and regions share a *lane*, and only a lane's head may leave it: a small
request never passes a large one that is before it, so nobody starves. Across lanes the Dispatcher
holds the replicas that an earlier head could use.

Among requests of equal priority the tenant goes first whose *service* is least (virtual token counters,
Sheng et al. 2024): what it was given so far, in tokens, cached input at a tenth and output at twice its
number. A tenant that comes back is lifted to the least of those who wait, so idleness saves up nothing.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass

from serving.messages import RouteRequest
from serving.routing import Prompt

CACHED_WEIGHT = 0.1
OUTPUT_WEIGHT = 2.0
MAX_TENANTS = 4096

Lane = tuple[str, tuple[str, ...]]  # model, allowed regions
Place = tuple[int, float, int]  # priority, service of the tenant, arrival number


@dataclass(frozen=True, slots=True)
class Waiting:
    request: RouteRequest
    arrival: int  # unique; kept when the request comes back after a refusal
    since_s: float  # unix time it began to wait
    expires_s: float  # unix time it is told that there was no room
    prompt: Prompt  # as foreseen when it began to wait
    num_bytes: int  # that it takes to hold it here
    refused_at: dict[str, tuple[int, int]]  # refuser → epoch and sequence of its report then

    @property
    def lane(self) -> Lane:
        return (self.request.model, self.request.allowed_regions)

    @property
    def line(self) -> tuple[int, str]:
        """Inside a lane: those of one tenant and priority are served as they came."""
        return (self.request.priority, self.request.tenant_key)


class WaitQueue:
    def __init__(self) -> None:
        self._waiting: dict[str, Waiting] = {}
        self._lanes: dict[Lane, dict[tuple[int, str], list[tuple[int, str]]]] = {}  # lines of (arrival, id)
        self._service: dict[str, float] = {}  # by tenant
        self._num_waiting: dict[str, int] = {}  # by tenant
        self._earliest_expiry_s = math.inf  # never later than the true one
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[Waiting]:
        return iter(self._waiting.values())

    def add(self, waiting: Waiting) -> None:
        request = waiting.request
        assert request.request_id not in self._waiting, "remove() the earlier one first"
        if request.tenant_key not in self._num_waiting and self._num_waiting:
            least = min(self._service.get(tenant, 0.0) for tenant in self._num_waiting)
            self._service[request.tenant_key] = max(least, self._service.get(request.tenant_key, 0.0))
        self._num_waiting[request.tenant_key] = self._num_waiting.get(request.tenant_key, 0) + 1
        self._waiting[request.request_id] = waiting
        line = self._lanes.setdefault(waiting.lane, {}).setdefault(waiting.line, [])
        insort(line, (waiting.arrival, request.request_id))
        self._earliest_expiry_s = min(self._earliest_expiry_s, waiting.expires_s)
        self.num_bytes += waiting.num_bytes

    def remove(self, request_id: str) -> Waiting | None:
        waiting = self._waiting.pop(request_id, None)
        if waiting is None:
            return None
        lines = self._lanes[waiting.lane]
        line = lines[waiting.line]
        del line[bisect_left(line, (waiting.arrival, request_id))]
        if not line:
            del lines[waiting.line]
        if not lines:
            del self._lanes[waiting.lane]
        tenant = waiting.request.tenant_key
        self._num_waiting[tenant] -= 1
        if not self._num_waiting[tenant]:
            del self._num_waiting[tenant]
        self.num_bytes -= waiting.num_bytes
        return waiting

    def served(self, tenant_key: str, tokens: float) -> None:
        """The tenant was given so much service; less than 0 to take some back."""
        self._service[tenant_key] = max(0.0, self._service.get(tenant_key, 0.0) + tokens)
        if len(self._service) > MAX_TENANTS:  # forget who was given least and waits for nothing
            idle = [tenant for tenant in self._service if tenant not in self._num_waiting]
            for tenant in sorted(idle, key=lambda tenant: self._service[tenant])[: MAX_TENANTS // 2]:
                del self._service[tenant]

    def place(self, waiting: Waiting) -> Place:
        """Where it stands now: lower is earlier."""
        request = waiting.request
        return (request.priority, self._service.get(request.tenant_key, 0.0), waiting.arrival)

    def heads(self) -> list[Waiting]:
        """The first of every lane, first of all first."""
        return sorted((self.head(lane) for lane in self._lanes), key=self.place)

    def head(self, lane: Lane) -> Waiting:
        """The first of a lane that somebody waits in."""
        firsts = (self._waiting[line[0][1]] for line in self._lanes[lane].values())
        return min(firsts, key=self.place)

    def __contains__(self, lane: Lane) -> bool:
        """Whether somebody waits in this lane."""
        return lane in self._lanes

    def ahead(self, waiting: Waiting) -> tuple[int, int]:
        """About how many requests for its model are served before it, and the blocks they want.

        Of its own line, all that came earlier; of every other tenant with its priority, as many as of
        its own; of lower priority numbers, all.
        """
        priority, tenant = waiting.line
        own = self._lanes.get(waiting.lane, {}).get(waiting.line, [])
        turns = bisect_left(own, (waiting.arrival, ""))
        count = blocks = 0
        for (model, _), lines in self._lanes.items():
            if model != waiting.request.model:
                continue
            for (line_priority, line_tenant), line in lines.items():
                if line_priority < priority:
                    before = line
                elif line_priority > priority:
                    continue
                elif line_tenant == tenant:
                    before = line[: bisect_left(line, (waiting.arrival, ""))]
                else:
                    before = line[: turns + 1]
                count += len(before)
                blocks += sum(self._waiting[request_id].prompt.demand_blocks for _, request_id in before)
        return count, blocks

    def expired(self, now: float) -> list[Waiting]:
        """Remove and return, in order of arrival, those whose time is over."""
        if now < self._earliest_expiry_s:
            return []
        over = sorted((w for w in self if w.expires_s <= now), key=lambda waiting: waiting.arrival)
        for waiting in over:
            self.remove(waiting.request.request_id)
        self._earliest_expiry_s = min((waiting.expires_s for waiting in self), default=math.inf)
        return over

    def ingress_gone(self, ingress_id: str) -> None:
        for waiting in list(self):
            if waiting.request.ingress_id == ingress_id:
                self.remove(waiting.request.request_id)

    def check_integrity(self) -> None:
        """Every waiting request is in its own line once, lines are in order, and the sums agree."""
        in_lines = [
            request_id for lines in self._lanes.values() for line in lines.values() for _, request_id in line
        ]
        assert sorted(in_lines) == sorted(self._waiting)
        for lane, lines in self._lanes.items():
            for name, line in lines.items():
                assert line and line == sorted(line)
                assert all(
                    self._waiting[request_id].lane == lane and self._waiting[request_id].line == name
                    for _, request_id in line
                )
        tenants = [waiting.request.tenant_key for waiting in self]
        assert self._num_waiting == {tenant: tenants.count(tenant) for tenant in tenants}
        assert self.num_bytes == sum(waiting.num_bytes for waiting in self)
        assert all(self._earliest_expiry_s <= waiting.expires_s for waiting in self)
