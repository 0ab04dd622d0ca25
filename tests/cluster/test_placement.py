"""Tensor-parallel groups as placement groups: enough room for everybody, ranks in node order."""

import math
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.placement import RANK_CPUS, REPLICA_CPUS, plan_group, rank_order


@pytest.mark.parametrize(
    ("tp", "device", "ranks_per_node", "strategy"),
    [
        (1, "cpu", None, "STRICT_PACK"),
        (8, "cuda", 8, "STRICT_PACK"),
        (16, "cuda", 8, "PACK"),
        (3, "cpu", 1, "STRICT_SPREAD"),
        (4, "cpu", 2, "SPREAD"),
        (2, "cpu", 2, "STRICT_PACK"),
    ],
)
def test_a_group_stays_on_one_node_while_it_fits(
    tp: int, device: str, ranks_per_node: int | None, strategy: str
) -> None:
    """NVLink inside a node is many times the fabric between nodes, so leaving it is never left to chance."""
    assert plan_group(tp, device, ranks_per_node=ranks_per_node).strategy == strategy  # type: ignore[arg-type]


@given(st.integers(1, 16), st.sampled_from(["cpu", "cuda"]), st.none() | st.integers(1, 8))
@settings(max_examples=60, deadline=None)
def test_bundles_hold_every_rank_and_the_replica(tp: int, device: str, ranks_per_node: int | None) -> None:
    """One bundle a rank; the replica's own claim is in bundle 0; GPUs are claimed where there are GPUs."""
    placement = plan_group(tp, device, ranks_per_node=ranks_per_node)  # type: ignore[arg-type]
    assert len(placement.bundles) == tp
    cpus = [bundle["CPU"] for bundle in placement.bundles]
    assert math.isclose(sum(cpus), REPLICA_CPUS + tp * RANK_CPUS) and cpus[0] >= REPLICA_CPUS + RANK_CPUS
    assert sum(bundle.get("GPU", 0) for bundle in placement.bundles) == (tp if device == "cuda" else 0)


def test_labels_say_region_and_gpu_kind() -> None:
    """A CPU group has no use for an accelerator's label, and an unpinned one has no labels."""
    gpu = plan_group(2, "cuda", region="eu-west", accelerator="H100")
    assert gpu.label_selector == {"ray.io/availability-region": "eu-west", "ray.io/accelerator-type": "H100"}
    assert plan_group(1, "cpu", region="eu-west", accelerator="H100").label_selector == {
        "ray.io/availability-region": "eu-west"
    }
    assert plan_group(1, "cuda").label_selector == {}


def test_ranks_follow_nodes_from_the_rendezvous_node() -> None:
    """Ray scattered bundles over z, a, z, a: ranks 0 and 1 are on z, because bundle 0 is."""
    assert rank_order(["z", "a", "z", "a"]) == [0, 2, 1, 3]
    assert rank_order(["n"]) == [0]


@given(st.lists(st.sampled_from("abcd"), min_size=1, max_size=16))
@settings(max_examples=100, deadline=None)
def test_rank_order_is_a_permutation_with_each_node_in_one_run(nodes: list[str]) -> None:
    """Every bundle gets one rank, rank 0 is in bundle 0, and ranks of a node are neighbours."""
    order = rank_order(nodes)
    assert sorted(order) == list(range(len(nodes))) and order[0] == 0
    along = [nodes[bundle] for bundle in order]
    changes = sum(here != there for here, there in pairwise(along))
    assert changes == len(set(nodes)) - 1
