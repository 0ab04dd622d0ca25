"""A replica's ranks: one actor a bundle of its placement group, made together and lost together."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec
import ray
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util import get_current_placement_group, placement_group_table
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.placement import RANK_CPUS, rank_order
from serving.config import EngineConfig, ModelConfig
from serving.errors import ConfigError
from serving.messages import BlockSnapshot, StepFrame, Submit, SubmitReply, decode, encode
from serving.rank import Rank, RankIdentity, RankReady

logger = logging.getLogger(__name__)


class ReplicaSetup(msgspec.Struct, frozen=True, kw_only=True):
    """What `app.compose` tells a replica. Nothing of other regions, nor of how many replicas there are:
    what changes here makes Serve replace the replica.
    """

    model: ModelConfig
    engine: EngineConfig
    region: str
    pretend_rtt_ms: float
    environment: dict[str, str]  # of every rank
    log_level: str


class RankGroup:
    """Rank 0 and its followers. Any rank's death ends the group: `on_death` is told once."""

    def __init__(self, ranks: list[Any], ready: list[RankReady], on_death: Callable[[str], None]) -> None:
        self._ranks = ranks
        self.ready = ready
        self._on_death = on_death
        self._watches = [
            asyncio.create_task(self._watch(index, rank.follow.remote()))
            for index, rank in enumerate(ranks)
            if index
        ]

    @classmethod
    async def start(
        cls,
        setup: ReplicaSetup,
        replica_id: str,
        on_death: Callable[[str], None],
    ) -> RankGroup:
        """Make the ranks in the current placement group and load them, all at once.

        Raises ConfigError when a rank says that what was asked is impossible.
        """
        world_size = setup.engine.tensor_parallel
        group = get_current_placement_group()
        if group is None:
            raise ConfigError("a ModelReplica needs a placement group: deploy it through serving.app:build")
        nodes = placement_group_table(group)["bundles_to_node_id"]
        addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
        order = rank_order([nodes[index] for index in range(world_size)])
        ranks: list[Any] = []
        for rank, bundle in enumerate(order):
            identity = RankIdentity(
                replica_id=replica_id,
                region=setup.region,
                rank=rank,
                world_size=world_size,
                ranks_on_node=sum(node == nodes[bundle] for node in nodes.values()),
                node_address=addresses[nodes[bundle]],
            )
            options: dict[str, Any] = {
                "num_cpus": RANK_CPUS,
                "num_gpus": 1 if setup.engine.device == "cuda" else 0,
                "max_restarts": 0,
                "scheduling_strategy": PlacementGroupSchedulingStrategy(group, bundle),
                "runtime_env": {"env_vars": setup.environment},
            }
            ranks.append(ray.remote(Rank).options(**options).remote(identity, setup.model, setup.engine))
        try:
            rendezvous = await ranks[0].rendezvous.remote()
            ready = await asyncio.gather(*(rank.load.remote(rendezvous) for rank in ranks))
        except RayError as failed:
            _kill(ranks)
            raise _cause(failed) from failed
        return cls(ranks, ready, on_death)

    async def frames(self) -> AsyncIterator[list[StepFrame]]:
        """Rank 0's frames until it ends. Raises RayError when it dies or its engine fails."""
        async for reference in self._ranks[0].frames.options(num_returns="streaming").remote():
            yield decode(await reference, list[StepFrame])

    async def submit(self, submits: list[Submit]) -> list[SubmitReply]:
        return decode(await self._ranks[0].submit.remote(encode(submits)), list[SubmitReply])

    async def abort(self, request_ids: list[str]) -> None:
        await self._ranks[0].abort.remote(request_ids)

    async def load_report(self) -> bytes:
        return await self._ranks[0].load_report.remote()

    async def block_snapshot(self) -> BlockSnapshot:
        return decode(await self._ranks[0].block_snapshot.remote(), BlockSnapshot)

    def close(self) -> None:
        """End every rank at once; a group never outlives one of its ranks."""
        for watch in self._watches:
            watch.cancel()
        _kill(self._ranks)

    async def _watch(self, rank: int, following: Any) -> None:
        try:
            await following
            self._on_death(f"rank {rank} stopped following")
        except RayActorError:
            self._on_death(f"rank {rank} died")
        except RayError as failed:
            self._on_death(f"rank {rank} failed: {failed}")


def _kill(ranks: list[Any]) -> None:
    for rank in ranks:
        ray.kill(rank)


def _cause(failed: RayError) -> Exception:
    """What the rank itself raised; of a rank that died there is only Ray's word."""
    cause = failed.cause if isinstance(failed, RayTaskError) else None
    return cause if isinstance(cause, Exception) else failed
