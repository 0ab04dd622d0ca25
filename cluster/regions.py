"""Where the GPUs are: regions, their nodes and fabrics, and the milliseconds between them.

A cluster file is YAML of this shape (`manifests/regions.example.yaml` is a whole one)::

    regions:
      - name: us-east
        fabric: {kind: infiniband, adapters: ["mlx5_0:1"], socket_interface: eth0}
        nodes: [{name: h100-pool, count: 4, sku: h100, gpus: 8}]
      - name: eu-west
    skus: {h100: {accelerator: H100, memory_gib: 80, bf16_tflops: 989, memory_gb_s: 3350}}
    round_trips_ms: {us-east: {eu-west: 75}}

Unknown keys fail, and so does a pair of regions whose round trip nobody gave.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

Name = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]*[a-z0-9])?$")]
Milliseconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Interface = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.:-]+$")]  # one name: no list, no NCCL operator

PRETEND_RTT_MS = 60.0
"""Round trip of two pretend regions that the table below does not know."""

# Typical round trips between cloud regions over their providers' backbones, rounded.
_KNOWN_RTT_MS = {
    ("us-east", "us-west"): 65.0,
    ("us-east", "eu-west"): 75.0,
    ("us-east", "eu-central"): 90.0,
    ("us-east", "ap-northeast"): 150.0,
    ("us-east", "ap-southeast"): 220.0,
    ("us-west", "eu-west"): 130.0,
    ("us-west", "eu-central"): 145.0,
    ("us-west", "ap-northeast"): 100.0,
    ("us-west", "ap-southeast"): 165.0,
    ("eu-west", "eu-central"): 25.0,
    ("eu-west", "ap-northeast"): 210.0,
    ("eu-west", "ap-southeast"): 175.0,
    ("eu-central", "ap-northeast"): 225.0,
    ("eu-central", "ap-southeast"): 160.0,
    ("ap-northeast", "ap-southeast"): 70.0,
}


class ClusterFileError(ValueError):
    """A cluster file that cannot be used. Names the file, the key and the fix."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class _Fabric(_Frozen):
    """`environment` is set as it is, over what `cluster.nccl` derives."""

    environment: dict[str, str] = {}


class _NotInfiniBand(_Fabric):
    @model_validator(mode="after")
    def _has_no_verbs(self) -> _NotInfiniBand:
        """NCCL_IB_* steers verbs devices: elsewhere it is ignored at best, and hides the real fault."""
        verbs = sorted(key for key in self.environment if key.startswith("NCCL_IB_"))
        if verbs:
            raise ValueError(
                f"{', '.join(verbs)} has no meaning here: remove it, or declare kind: infiniband"
            )
        return self


class InfiniBand(_Fabric):
    kind: Literal["infiniband"] = "infiniband"
    adapters: Annotated[tuple[Interface, ...], Field(min_length=1)]  # one a rail, such as "mlx5_0:1"
    socket_interface: Interface  # for NCCL's bootstrap, not for data
    rail_optimised: bool = True  # adapter i of every node hangs on switch i
    service_level: Annotated[int, Field(ge=0, le=15)] | None = None
    topology_file: str | None = None  # where a virtual machine hides the PCI tree (Azure ND)


class Efa(_NotInfiniBand):
    """AWS Elastic Fabric Adapter, through the aws-ofi-nccl plugin."""

    kind: Literal["efa"] = "efa"
    socket_interface: Interface


class Tcpxo(_NotInfiniBand):
    """Google GPUDirect-TCPXO (a3-megagpu), through its NCCL plugin, "FasTrak"."""

    kind: Literal["tcpxo"] = "tcpxo"
    socket_interface: Interface = "eth0"
    data_interfaces: Annotated[tuple[Interface, ...], Field(min_length=1)]  # one a GPU
    aperture_devices: str = "/dev/aperture_devices"


class Ethernet(_NotInfiniBand):
    kind: Literal["ethernet"] = "ethernet"
    socket_interface: Interface


class Loopback(_NotInfiniBand):
    """One machine: every rank is on the same node."""

    kind: Literal["loopback"] = "loopback"
    socket_interface: Interface = "lo"  # "lo0" on macOS


Fabric = Annotated[InfiniBand | Efa | Tcpxo | Ethernet | Loopback, Field(discriminator="kind")]


class GpuSku(_Frozen):
    """A kind of GPU, with the two rates a roofline needs."""

    accelerator: str  # value of Ray's label ray.io/accelerator-type
    memory_gib: Positive
    bf16_tflops: Positive  # dense
    memory_gb_s: Positive
    usd_per_hour: Positive | None = None  # of one


class Node(_Frozen):
    """`count` nodes of one kind."""

    name: Name
    count: Count = 1
    gpus: Annotated[int, Field(ge=0)] = 0  # a node
    sku: str | None = None

    @model_validator(mode="after")
    def _gpus_have_a_sku(self) -> Node:
        if bool(self.gpus) != bool(self.sku):
            raise ValueError("give both gpus and sku, or neither for a node without GPUs")
        return self


class Region(_Frozen):
    name: Name
    fabric: Fabric = Loopback()
    nodes: tuple[Node, ...] = ()
    egress_usd_per_gb: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0  # of what leaves it


class ClusterMap(_Frozen):
    """Every region, and the round trips between them.

    A round trip holds both ways unless both are given; within a region it is 0 unless given.
    """

    regions: Annotated[tuple[Region, ...], Field(min_length=1)]
    skus: dict[str, GpuSku] = {}
    round_trips_ms: dict[str, dict[str, Milliseconds]] = {}
    default_rtt_ms: Milliseconds | None = None

    def region(self, name: str) -> Region:
        """Raises ClusterFileError naming the regions there are."""
        for region in self.regions:
            if region.name == name:
                return region
        raise ClusterFileError(f"there is no region {name!r}; the regions are {', '.join(self._names())}")

    def fabric(self, name: str) -> InfiniBand | Efa | Tcpxo | Ethernet | Loopback:
        return self.region(name).fabric

    def rtt_ms(self, here: str, there: str) -> float:
        """Round trip in milliseconds from region `here` to region `there`."""
        self.region(here)
        self.region(there)
        given = self._given_ms(here, there)
        if given is not None:
            return given
        if here == there:
            return 0.0
        assert self.default_rtt_ms is not None  # or the map would not be whole
        return self.default_rtt_ms

    def egress_ms(self, here: str, there: str, num_bytes: int, gpus: int) -> float:
        """What it costs to bring `num_bytes` from region `there` to `here`, in milliseconds.

        They are those that a replica of `gpus` GPUs runs for the same money, at the lowest price of a GPU
        in `there`; 0 within a region, and where no price is given.
        """
        region = self.region(there)
        skus = [self.skus[node.sku] for node in region.nodes if node.sku is not None]
        prices = [sku.usd_per_hour for sku in skus if sku.usd_per_hour is not None]
        if here == there or not prices:
            return 0.0
        return region.egress_usd_per_gb * num_bytes / 1e9 / (min(prices) * gpus / 3.6e6)

    def _given_ms(self, here: str, there: str) -> float | None:
        one_way = self.round_trips_ms.get(here, {}).get(there)
        return one_way if one_way is not None else self.round_trips_ms.get(there, {}).get(here)

    def _names(self) -> list[str]:
        return [region.name for region in self.regions]

    @model_validator(mode="after")
    def _is_whole(self) -> ClusterMap:
        names = self._names()
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"regions: {name} is there twice; give each region one name")
        for region in self.regions:
            for node in region.nodes:
                if node.sku is not None and node.sku not in self.skus:
                    raise ValueError(f"skus: {node.sku}, which {region.name} uses, is missing; add it")
        told = set(self.round_trips_ms).union(*self.round_trips_ms.values())
        if told - set(names):
            strange = ", ".join(sorted(told - set(names)))
            raise ValueError(f"round_trips_ms: {strange} is no region; the regions are {', '.join(names)}")
        for here, there in combinations(names, 2):
            if self._given_ms(here, there) is None and self.default_rtt_ms is None:
                raise ValueError(
                    f"round_trips_ms: {here} to {there} is missing; "
                    f"add `{here}: {{{there}: <ms>}}`, or set default_rtt_ms"
                )
        return self


def read_cluster_file(path: Path) -> ClusterMap:
    """The map in a YAML file. Raises ClusterFileError naming the file, the key and the fix."""
    try:
        content = yaml.safe_load(path.read_text())
    except FileNotFoundError as missing:
        raise ClusterFileError(f"{path}: there is no such file") from missing
    except (OSError, UnicodeDecodeError) as unreadable:
        raise ClusterFileError(f"{path}: cannot be read: {unreadable}") from unreadable
    except yaml.YAMLError as broken:
        raise ClusterFileError(f"{path}: not valid YAML: {broken}") from broken
    try:
        return ClusterMap.model_validate(content)
    except ValidationError as invalid:
        raise ClusterFileError("\n".join(_explain(path, error) for error in invalid.errors())) from invalid


def pretend(names: Sequence[str]) -> ClusterMap:
    """A map of made-up regions on this machine, with round trips like those of real ones."""
    round_trips: dict[str, dict[str, float]] = {}
    for here, there in combinations(names, 2):
        round_trips.setdefault(here, {})[there] = _pretend_ms(here, there)
    return ClusterMap(
        regions=tuple(Region(name=name) for name in names),
        round_trips_ms=round_trips,
        default_rtt_ms=PRETEND_RTT_MS,
    )


def _pretend_ms(here: str, there: str) -> float:
    for (one, other), known_ms in _KNOWN_RTT_MS.items():
        if (_is_in(here, one) and _is_in(there, other)) or (_is_in(here, other) and _is_in(there, one)):
            return known_ms
    return PRETEND_RTT_MS


def _is_in(name: str, area: str) -> bool:
    """us-east, us-east-1 and us-east1 are all in us-east."""
    return name == area or name.rstrip("0123456789").rstrip("-") == area


def _explain(path: Path, error: Any) -> str:
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"{path}: unknown key {key!r}: remove it, or check its spelling"
    message = error["msg"].removeprefix("Value error, ")
    return f"{path}: {key + ': ' if key else ''}{message}"
