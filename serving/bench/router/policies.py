"""Every policy that can be simulated, by name."""

from __future__ import annotations

from collections.abc import Set as AbstractSet

from cluster.load import ReplicaLoad
from serving.bench.router.baselines import BASELINES
from serving.bench.router.omniscient import OmniscientRouter
from serving.dispatcher import Dispatcher, DispatcherLimits
from serving.errors import ConfigError
from serving.messages import BlockEvents, BlockSnapshot, DispatchUpdate, RouteReply, RouteRequest
from serving.simulator import MakePolicy, Policy, SimSetup

OURS = "searoom"
OMNISCIENT = "omniscient"

Answers = list[tuple[str, RouteReply]]


def searoom(number: int, setup: SimSetup) -> Policy:
    """The production policy as it is deployed, without a setting changed."""
    return Dispatcher(
        DispatcherLimits(),
        rtt_from(number, setup),
        block_tokens=setup.block_tokens,
        seed=setup.seed * 1009 + number,
    )


def rtt_from(number: int, setup: SimSetup) -> dict[str, float]:
    """Milliseconds of a round trip from the router of this number to each region."""
    here = setup.router_regions[number] if setup.router_regions else setup.replicas[0].region
    regions = {spec.region for spec in setup.replicas}
    return {region: setup.rtt_s(here, region) * 1e3 for region in sorted(regions)}


POLICIES: dict[str, MakePolicy] = {OURS: searoom, OMNISCIENT: OmniscientRouter, **BASELINES}


def named(names: str) -> tuple[str, ...]:
    """The policies of a comma-separated list. Raises ConfigError for a name that is none."""
    chosen = tuple(dict.fromkeys(part.strip() for part in names.split(",") if part.strip()))
    unknown = [name for name in chosen if name not in POLICIES]
    if unknown or not chosen:
        raise ConfigError(f"--policies {names}: choose among {', '.join(POLICIES)}")
    return chosen


class OwnRegion:
    """A policy that is told of the replicas of one region only: serving as if there were no other."""

    def __init__(self, policy: Policy, region: str, setup: SimSetup) -> None:
        self._policy = policy
        self._own = frozenset(spec.name for spec in setup.replicas if spec.region == region)

    def request(self, request: RouteRequest, now: float) -> RouteReply:
        return self._policy.request(request, now)

    def update(self, update: DispatchUpdate, now: float) -> Answers:
        return self._policy.update(update, now)

    def replica_reported(self, load: ReplicaLoad, now: float) -> Answers:
        return self._policy.replica_reported(load, now) if load.replica_id in self._own else []

    def replica_events(
        self, replica_id: str, epoch: int, news: BlockEvents | BlockSnapshot, now: float
    ) -> bool:
        return replica_id not in self._own or self._policy.replica_events(replica_id, epoch, news, now)

    def membership(self, ids: AbstractSet[str], now: float) -> Answers:
        return self._policy.membership(set(ids) & self._own, now)

    def tick(self, now: float) -> Answers:
        return self._policy.tick(now)


def own_region_only(make_policy: MakePolicy) -> MakePolicy:
    """Each router serves with its own region's replicas."""

    def make(number: int, setup: SimSetup) -> Policy:
        return OwnRegion(make_policy(number, setup), setup.router_regions[number], setup)

    return make
