"""What a peer's router knows when it picks, and nothing more.

- what it sent itself and has not seen end (`in_flight`), and the prompts of that;
- the replicas' last load reports, as old as the simulation delivers them;
- the engines' block events, where the router that is modelled reads them.

A rule sees one `Candidate` a replica and says which are equally good; one of those is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from cluster.load import ReplicaLoad
from serving.bench.router.baseline_trees import Units


@dataclass(frozen=True, slots=True)
class Asked:
    """A request as a router sees it. A prefix of `n` units is `n * grain` of the prompt's `size`.

    In a simulation the units are block hashes and sizes are tokens; in front of a real gateway both
    are characters.
    """

    request_id: str
    units: Units
    grain: int
    size: int
    prompt_tokens: int

    def rate(self, matched_units: int) -> float:
        """The part of the prompt that so many units are."""
        return matched_units * self.grain / self.size if self.size else 0.0


@dataclass(eq=False, slots=True)
class Candidate:
    """One replica."""

    name: str
    region: str
    row: int = 0  # in the index of block events
    load: ReplicaLoad | None = None
    in_flight: int = 0
    unreported: dict[str, int] = field(default_factory=dict)
    """Uncached prompt tokens, when it was sent, of each request that `load` does not include yet."""
    active: dict[bytes, int] = field(default_factory=dict)
    """Blocks of the prompts in flight, and how many of these share each."""
    matched_blocks: int = 0  # of the request being routed, by the engines' events

    @property
    def ongoing(self) -> int:
        """Requests there, other routers' too: as reported last, and those sent since."""
        if self.load is None:
            return self.in_flight
        return self.load.num_running + self.load.num_waiting + len(self.unreported)

    @property
    def backlog_tokens(self) -> int:
        """Prompt tokens there that are not computed yet, by the same reckoning."""
        reported = self.load.prefill_backlog_tokens if self.load else 0
        return reported + sum(self.unreported.values())

    @property
    def num_waiting(self) -> int:
        return self.load.num_waiting if self.load else 0

    @property
    def kv_usage(self) -> float:
        """Of the KV cache, what sequences hold: cached blocks without a reader are free (vLLM's figure)."""
        if self.load is None or not self.load.blocks_total:
            return 0.0
        return 1 - (self.load.blocks_free + self.load.blocks_evictable) / self.load.blocks_total


class Rule(Protocol):
    """A peer's way to pick."""

    name: str
    reads_events: bool  # wants `matched_blocks`
    tracks_active: bool  # wants `active`

    def joined(self, name: str) -> None:
        """A replica is there from now on."""
        ...

    def left(self, name: str) -> None: ...

    def choose(self, asked: Asked, candidates: Sequence[Candidate], now: float) -> Sequence[Candidate]:
        """The best of the candidates (there are some), equally good ones; none: the request waits."""
        ...

    def routed(self, asked: Asked, candidate: Candidate, now: float) -> None:
        """This request goes there."""
        ...


class Stateless:
    """What a rule that remembers nothing has."""

    reads_events = False
    tracks_active = False

    def joined(self, name: str) -> None:
        pass

    def left(self, name: str) -> None:
        pass

    def routed(self, asked: Asked, candidate: Candidate, now: float) -> None:
        pass
