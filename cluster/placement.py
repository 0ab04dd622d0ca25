"""A tensor-parallel group as a Ray placement group: bundles, strategy, labels, rank order. Pure.

    bundle 0: ModelReplica + rank      bundles 1..tp-1: a rank each

Serve puts the replica's own actor into bundle 0, so that bundle has room for both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

REGION_LABEL = "ray.io/availability-region"
ACCELERATOR_LABEL = "ray.io/accelerator-type"

REPLICA_CPUS = 0.1
RANK_CPUS = 0.1  # claims on Ray's CPU count, not threads: those are set in code

Strategy = Literal["STRICT_PACK", "PACK", "SPREAD", "STRICT_SPREAD"]


@dataclass(frozen=True, slots=True)
class GroupPlacement:
    """What Serve's `placement_group_*` options take."""

    bundles: list[dict[str, float]]  # one a rank
    strategy: Strategy
    label_selector: dict[str, str]  # for every bundle; empty: any node


def plan_group(
    tp: int,
    device: Literal["cpu", "cuda"],
    *,
    ranks_per_node: int | None = None,
    region: str | None = None,
    accelerator: str | None = None,
) -> GroupPlacement:
    """The placement of one replica of `tp` ranks.

    `ranks_per_node` is how many ranks one node takes: its GPUs, or on CPU whatever one wants to
    see spread. None means that one node takes the whole group. `accelerator` is a value of Ray's
    accelerator label, such as "H100", and is not used on CPU.
    """
    assert tp >= 1 and (ranks_per_node is None or ranks_per_node >= 1)
    rank: dict[str, float] = {"CPU": RANK_CPUS} | ({"GPU": 1.0} if device == "cuda" else {})
    first = rank | {"CPU": REPLICA_CPUS + RANK_CPUS}
    selector = {REGION_LABEL: region} if region is not None else {}
    if device == "cuda" and accelerator is not None:
        selector[ACCELERATOR_LABEL] = accelerator
    return GroupPlacement(
        bundles=[first] + [dict(rank) for _ in range(tp - 1)],
        strategy=_strategy(tp, device, ranks_per_node),
        label_selector=selector,
    )


def rank_order(nodes_of_bundles: Sequence[str]) -> list[int]:
    """The bundle of each rank, given the node of each bundle.

    Ranks of one node are neighbours, so that collectives cross nodes as seldom as they can; bundle
    0's node comes first, so that rank 0 stands where the ranks meet (the rendezvous address).
    """
    seen: dict[str, int] = {}
    for node in nodes_of_bundles:
        seen.setdefault(node, len(seen))
    return sorted(range(len(nodes_of_bundles)), key=lambda bundle: seen[nodes_of_bundles[bundle]])


def _strategy(tp: int, device: str, ranks_per_node: int | None) -> Strategy:
    if ranks_per_node is None or tp <= ranks_per_node:
        return "STRICT_PACK"
    if ranks_per_node == 1:
        return "STRICT_SPREAD"
    # GPUs bound what a node takes; a claim of 0.1 CPU does not, so Ray is asked to even it out.
    return "PACK" if device == "cuda" else "SPREAD"
