"""Requests that wait for room: lower priority numbers first, then arrival. Pure.

Requests with the same model and regions share a *lane*, and only a lane's head may leave it: a small
request never passes a large one that is before it, so nobody starves. Across lanes the Dispatcher
holds the replicas that an earlier head could use.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass

from serving.messages import RouteRequest

Lane = tuple[str, tuple[str, ...]]  # model, allowed regions
Place = tuple[int, int]  # priority, arrival number


@dataclass(frozen=True, slots=True)
class Waiting:
    request: RouteRequest
    arrival: int  # unique; kept when the request comes back after a refusal
    since_s: float  # unix time it began to wait
    expires_s: float  # unix time it is told that there was no room
    blocks: int  # its demand
    refused_at: dict[str, tuple[int, int]]  # refuser → epoch and sequence of its report then

    @property
    def place(self) -> Place:
        return (self.request.priority, self.arrival)

    @property
    def lane(self) -> Lane:
        return (self.request.model, self.request.allowed_regions)


class WaitQueue:
    def __init__(self) -> None:
        self._waiting: dict[str, Waiting] = {}
        self._lanes: dict[Lane, list[tuple[Place, str]]] = {}  # each in order
        self._earliest_expiry_s = math.inf  # never later than the true one

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[Waiting]:
        return iter(self._waiting.values())

    def add(self, waiting: Waiting) -> None:
        request_id = waiting.request.request_id
        assert request_id not in self._waiting, "remove() the earlier one first"
        self._waiting[request_id] = waiting
        insort(self._lanes.setdefault(waiting.lane, []), (waiting.place, request_id))
        self._earliest_expiry_s = min(self._earliest_expiry_s, waiting.expires_s)

    def remove(self, request_id: str) -> Waiting | None:
        waiting = self._waiting.pop(request_id, None)
        if waiting is not None:
            lane = self._lanes[waiting.lane]
            del lane[bisect_left(lane, (waiting.place, request_id))]
            if not lane:
                del self._lanes[waiting.lane]
        return waiting

    def heads(self) -> list[Waiting]:
        """The first of every lane, first of all first."""
        return sorted((self._waiting[lane[0][1]] for lane in self._lanes.values()), key=lambda w: w.place)

    def head(self, lane: Lane) -> Waiting:
        """The first of a lane that somebody waits in."""
        return self._waiting[self._lanes[lane][0][1]]

    def __contains__(self, lane: Lane) -> bool:
        """Whether somebody waits in this lane."""
        return lane in self._lanes

    def ahead(self, model: str, place: Place) -> tuple[int, int]:
        """How many requests for `model` are before `place`, and the blocks they want."""
        count = blocks = 0
        for (lane_model, _), places in self._lanes.items():
            if lane_model == model:
                before = places[: bisect_left(places, (place, ""))]
                count += len(before)
                blocks += sum(self._waiting[request_id].blocks for _, request_id in before)
        return count, blocks

    def expired(self, now: float) -> list[Waiting]:
        """Remove and return, in order, those whose time is over."""
        if now < self._earliest_expiry_s:
            return []
        over = sorted((w for w in self if w.expires_s <= now), key=lambda waiting: waiting.place)
        for waiting in over:
            self.remove(waiting.request.request_id)
        self._earliest_expiry_s = min((waiting.expires_s for waiting in self), default=math.inf)
        return over

    def ingress_gone(self, ingress_id: str) -> None:
        for waiting in list(self):
            if waiting.request.ingress_id == ingress_id:
                self.remove(waiting.request.request_id)

    def check_integrity(self) -> None:
        """Every waiting request is in its own lane once, and lanes are in order."""
        in_lanes = [request_id for lane in self._lanes.values() for _, request_id in lane]
        assert sorted(in_lanes) == sorted(self._waiting)
        for lane, places in self._lanes.items():
            assert places and places == sorted(places)
            assert all(self._waiting[request_id].lane == lane for _, request_id in places)
        assert all(self._earliest_expiry_s <= waiting.expires_s for waiting in self)
