"""A sequence of simulated requests, and what can be done to its clock and places. Pure.

A workload is made once, in its own time, by a trace reader or by the generator; `capacity.at_load`
then stretches that time until a fleet is as busy as was wished.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from serving.simulator import SimRequest

HASH_BYTES = 16
_WARP_POINTS = 4096

T = TypeVar("T")


@dataclass(frozen=True)
class Workload:
    """Requests in order of arrival, numbered from 0. `notes` say what is not as it was recorded."""

    name: str
    requests: tuple[SimRequest, ...]
    notes: tuple[str, ...] = ()

    @property
    def span_s(self) -> float:
        """Seconds between the first arrival and the last."""
        return self.requests[-1].arrival_s - self.requests[0].arrival_s if self.requests else 0.0

    @property
    def regions(self) -> tuple[str, ...]:
        return tuple(sorted({request.region for request in self.requests}))


def chain_hash(parent: bytes, content: bytes) -> bytes:
    """The name of a block with this content behind `parent`; chained as serving.block_hash does."""
    return hashlib.blake2b(parent + content, digest_size=HASH_BYTES).digest()


def hash_chain(parent: bytes, label: bytes, first: int = 0) -> Iterator[bytes]:
    """Names of the blocks of one endless text that nobody else has, from block `first` on."""
    index = first
    while True:
        parent = chain_hash(parent, label + index.to_bytes(8, "little"))
        yield parent
        index += 1


def in_order(requests: Sequence[SimRequest]) -> tuple[SimRequest, ...]:
    """Sorted by arrival, numbered anew, the first at second 0."""
    ordered = sorted(requests, key=lambda request: (request.arrival_s, request.number))
    start_s = ordered[0].arrival_s if ordered else 0.0
    return tuple(
        replace(request, number=number, arrival_s=request.arrival_s - start_s)
        for number, request in enumerate(ordered)
    )


@dataclass(frozen=True, slots=True)
class Window:
    """Which part of a trace: the `number`-th of `of` windows of `size` requests, evenly spread over it.

    Windows overlap where a trace is too short for all; size 0 is the whole trace.
    """

    number: int = 0
    of: int = 1
    size: int = 0

    def cut(self, whole: Sequence[T]) -> Sequence[T]:
        if self.size <= 0 or self.size >= len(whole):
            return whole
        first = round(self.number % self.of * (len(whole) - self.size) / max(1, self.of - 1))
        return whole[first : first + self.size]


def time_scaled(workload: Workload, factor: float) -> Workload:
    """Every arrival `factor` times as late, deadlines as long after it as before."""
    scaled = tuple(
        replace(
            request,
            arrival_s=request.arrival_s * factor,
            deadline_s=request.deadline_s + request.arrival_s * (factor - 1),
        )
        for request in workload.requests
    )
    return replace(workload, requests=scaled)


def with_tenants(workload: Workload, rates: Sequence[float], seed: int) -> Workload:
    """The same requests, their sessions dealt out to tenants of these rates."""
    names = tuple(f"tenant-{number}" for number in range(len(rates)))
    shares = np.array(rates) / sum(rates)
    owners = _dealt(workload.requests, shares, seed)
    requests = tuple(
        replace(request, tenant=names[owner])
        for request, owner in zip(workload.requests, owners, strict=True)
    )
    return replace(workload, requests=requests)


def in_regions(
    workload: Workload, regions: Sequence[str], seed: int, depth: float = 0.8, days: float = 1.0
) -> Workload:
    """The same requests, their sessions dealt out to `regions` whose days are shifted against each other.

    Region r's arrival rate becomes `1 + depth · cos(2π · (days · t / span − r / regions))` times what
    it was; `0 ≤ depth < 1`. No public trace pairs prefixes with regions, so this part is synthetic.
    """
    home_of = _dealt(workload.requests, np.full(len(regions), 1 / len(regions)), seed)
    arrivals_s = np.array([request.arrival_s for request in workload.requests])
    warped_s = arrivals_s.copy()
    for number in range(len(regions)):
        mine = home_of == number
        warped_s[mine] = diurnal(arrivals_s[mine], workload.span_s, number / len(regions), depth, days)
    requests = [
        replace(request, region=regions[home], arrival_s=float(at_s))
        for request, home, at_s in zip(workload.requests, home_of, warped_s, strict=True)
    ]
    note = f"sessions dealt out to {len(regions)} regions with phase-shifted days: synthetic"
    return replace(
        workload,
        name=f"{workload.name}, {len(regions)} regions",
        requests=in_order(requests),
        notes=(*workload.notes, note),
    )


def diurnal(
    arrivals_s: NDArray[np.float64], span_s: float, phase: float, depth: float, days: float = 1.0
) -> NDArray[np.float64]:
    """Arrival times moved so that an even rate becomes `1 + depth · cos(2π · (days · t / span − phase))`.

    The wave's integral is inverted on a grid; the span stays what it is when `days` is whole.
    """
    if span_s <= 0:
        return arrivals_s
    turns = np.linspace(0.0, 1.0, _WARP_POINTS)
    angle, start = 2 * np.pi * (days * turns - phase), -2 * np.pi * phase
    integral = turns + depth / (2 * np.pi * days) * (np.sin(angle) - np.sin(start))
    return np.interp(arrivals_s / span_s, integral / integral[-1], turns) * span_s


def _dealt(requests: Sequence[SimRequest], shares: NDArray[np.float64], seed: int) -> NDArray[np.int64]:
    """One of `len(shares)` for each request, the same for all of a session."""
    rng = np.random.default_rng(seed)
    drawn = rng.choice(len(shares), size=len(requests), p=shares)
    of_session: dict[int, int] = {}
    return np.array(
        [
            of_session.setdefault(request.session, int(choice)) if request.session >= 0 else int(choice)
            for request, choice in zip(requests, drawn, strict=True)
        ],
        dtype=np.int64,
    )
