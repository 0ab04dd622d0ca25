"""The cluster file: what it says is what is known, and what it says wrongly is named with its fix."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from cluster.regions import (
    ClusterFileError,
    ClusterMap,
    Efa,
    InfiniBand,
    Loopback,
    pretend,
    read_cluster_file,
)

EXAMPLE = Path(__file__).parents[2] / "manifests" / "regions.example.yaml"


def read(folder: Path, text: str) -> ClusterMap:
    path = folder / "cluster.yaml"
    path.write_text(text)
    return read_cluster_file(path)


def test_the_example_file_is_whole() -> None:
    """The file people copy from reads, with every fabric but loopback and both ways of each round trip."""
    cluster = read_cluster_file(EXAMPLE)
    assert [region.fabric.kind for region in cluster.regions] == ["infiniband", "efa", "tcpxo", "ethernet"]
    assert isinstance(cluster.fabric("us-east"), InfiniBand) and isinstance(cluster.fabric("us-west"), Efa)
    assert cluster.rtt_ms("us-east", "eu-west") == cluster.rtt_ms("eu-west", "us-east") == 75
    gpus = {region.name: sum(node.count * node.gpus for node in region.nodes) for region in cluster.regions}
    assert gpus == {"us-east": 32, "us-west": 16, "eu-west": 16, "eu-central": 6}


def test_round_trips_hold_both_ways_unless_both_are_given(tmp_path: Path) -> None:
    """a-b is told once; a-c differs by direction, as asymmetric routes do; inside a region it is 0."""
    cluster = read(
        tmp_path,
        """
        regions: [{name: a}, {name: b}, {name: c}]
        round_trips_ms: {a: {b: 10, c: 20, a: 0.4}, c: {a: 30}}
        default_rtt_ms: 99
        """,
    )
    pairs = [("a", "b"), ("b", "a"), ("a", "c"), ("c", "a"), ("b", "c"), ("a", "a"), ("b", "b")]
    assert [cluster.rtt_ms(*pair) for pair in pairs] == [10, 10, 20, 30, 99, 0.4, 0]


@pytest.mark.parametrize(
    ("text", "key", "fix"),
    [
        ("regions: [{name: a, colour: red}]", "regions.0.colour", "remove it, or check its spelling"),
        ("regions: [{name: a}]\nrtt: {}", "unknown key 'rtt'", "remove it"),
        (
            "regions: [{name: a}, {name: b}]",
            "round_trips_ms: a to b",
            "add `a: {b: <ms>}`, or set default_rtt_ms",
        ),
        ("regions: [{name: a}, {name: a}]", "regions: a", "give each region one name"),
        ("regions: [{name: a}]\nround_trips_ms: {a: {x: 1}}", "round_trips_ms: x", "the regions are a"),
        (
            "regions: [{name: a}]\nround_trips_ms: {a: {a: -1}}",
            "round_trips_ms.a.a",
            "greater than or equal to 0",
        ),
        ("regions: [{name: a, nodes: [{name: n, gpus: 8}]}]", "nodes.0", "give both gpus and sku"),
        ("regions: [{name: a, nodes: [{name: n, gpus: 8, sku: h100}]}]", "skus: h100", "add it"),
        ("regions: [{name: a, fabric: {kind: myrinet}}]", "regions.0.fabric", "'infiniband', 'efa'"),
        (
            "regions: [{name: a, fabric: {kind: infiniband, adapters: [], socket_interface: e}}]",
            "adapters",
            "1 item",
        ),
        ("regions: [{name: a, fabric: {kind: efa, hca: mlx5_0}}]", "regions.0.fabric.efa.hca", "remove it"),
        ("regions: [{name: US East}]", "regions.0.name", "should match pattern"),
        ("regions: []", "regions", "at least 1 item"),
        ("[]", "", "valid dictionary"),
        ("regions: [", "", "not valid YAML"),
    ],
)
def test_a_wrong_file_is_named_with_its_key_and_fix(tmp_path: Path, text: str, key: str, fix: str) -> None:
    """The message alone is enough to mend the file."""
    with pytest.raises(ClusterFileError) as caught:
        read(tmp_path, text)
    message = str(caught.value)
    assert str(tmp_path / "cluster.yaml") in message and key in message and fix in message


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    """A missing file is said to be missing, with its path."""
    with pytest.raises(ClusterFileError, match=r"nowhere\.yaml: there is no such file"):
        read_cluster_file(tmp_path / "nowhere.yaml")


def test_an_unknown_region_is_answered_with_the_known_ones() -> None:
    """Whoever misspells a region sees how it is spelt."""
    with pytest.raises(ClusterFileError, match="no region 'mars'; the regions are us-east, eu-west"):
        pretend(["us-east", "eu-west"]).rtt_ms("us-east", "mars")


def test_pretend_regions_are_as_far_apart_as_their_names() -> None:
    """Known pairs keep their milliseconds in either order and with a zone's number; others get 60."""
    cluster = pretend(["eu-west-1", "us-east1", "local", "us-east-2"])
    assert cluster.rtt_ms("us-east1", "eu-west-1") == 75
    assert cluster.rtt_ms("eu-west-1", "us-east-2") == 75
    assert cluster.rtt_ms("local", "eu-west-1") == 60
    assert cluster.rtt_ms("local", "local") == 0
    assert cluster.fabric("local") == Loopback()
    assert pretend(["local"]).rtt_ms("local", "local") == 0


def test_a_map_is_the_same_after_json() -> None:
    """It travels inside a Serve config's args, fabrics' kinds included."""
    cluster = read_cluster_file(EXAMPLE)
    assert ClusterMap.model_validate_json(cluster.model_dump_json()) == cluster


def test_a_map_cannot_be_changed() -> None:
    """A checked map stays the checked map."""
    with pytest.raises(ValidationError, match="frozen"):
        pretend(["a"]).regions[0].name = "b"  # type: ignore[misc]


def test_egress_is_weighed_in_the_time_that_its_money_buys():
    """1 GB at 0.02 $ is 12 s of two GPUs at 3 $ an hour; at home, or without a price, it is nothing."""
    there = {
        "name": "there",
        "egress_usd_per_gb": 0.02,
        "nodes": [{"name": "n", "sku": "a", "gpus": 2}, {"name": "m", "sku": "b", "gpus": 1}],
    }
    skus = {
        "a": {"accelerator": "A", "memory_gib": 80, "bf16_tflops": 1, "memory_gb_s": 1, "usd_per_hour": 3.0},
        "b": {"accelerator": "B", "memory_gib": 80, "bf16_tflops": 1, "memory_gb_s": 1, "usd_per_hour": 9.0},
    }
    content = {"regions": [{"name": "here"}, there], "skus": skus, "round_trips_ms": {"here": {"there": 10}}}
    cluster = ClusterMap.model_validate(content)
    assert cluster.egress_ms("here", "there", 10**9, 2) == pytest.approx(12_000)
    assert cluster.egress_ms("there", "there", 10**9, 2) == 0
    assert cluster.egress_ms("there", "here", 10**9, 2) == 0
