"""Every metric series, declared once, as data; `ray_compat.RayMeter` makes Ray's series from it.

Names carry their unit, and no `_total`: Prometheus adds it to a counter. Label values are bounded:
models, regions, replicas and outcomes, never a key, a tenant, a user or a request. Buckets of the
latencies are those of OpenTelemetry's GenAI conventions with finer ones below, where a step on a
GPU and a first token out of the prefix cache lie.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

Kind = Literal["counter", "gauge", "histogram"]
Tags = Mapping[str, str]


@dataclass(frozen=True)
class Series:
    """One metric. `boundaries` are a histogram's upper bucket edges, in `unit`, ascending."""

    name: str
    kind: Kind
    description: str
    unit: str
    tags: tuple[str, ...] = ()
    boundaries: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        assert (self.kind == "histogram") == bool(self.boundaries), self.name
        assert list(self.boundaries) == sorted(set(self.boundaries)), self.name


class Meter(Protocol):
    """Takes measurements. `tags` gives a value for each of the series' tags, and for no other."""

    def add(self, series: Series, amount: float, tags: Tags) -> None:
        """Count `amount` (not negative) more on a counter."""

    def set(self, series: Series, value: float, tags: Tags) -> None:
        """A gauge is now `value`."""

    def observe(self, series: Series, value: float, tags: Tags) -> None:
        """One more value in a histogram."""


Labels = tuple[tuple[str, str], ...]


@dataclass
class Observations:
    """A histogram's state: `counts` has one entry a bucket, and one for what lies above all of them."""

    counts: list[int]
    total: float = 0.0

    @property
    def count(self) -> int:
        return sum(self.counts)


@dataclass
class MemoryMeter:
    """A Meter that remembers: for tests, and for programs without Ray. Checks its callers."""

    values: dict[tuple[str, Labels], float] = field(default_factory=dict)
    observations: dict[tuple[str, Labels], Observations] = field(default_factory=dict)

    def add(self, series: Series, amount: float, tags: Tags) -> None:
        assert amount >= 0, f"{series.name}: a counter cannot go down"
        key = _key(series, "counter", tags)
        self.values[key] = self.values.get(key, 0.0) + amount

    def set(self, series: Series, value: float, tags: Tags) -> None:
        self.values[_key(series, "gauge", tags)] = value

    def observe(self, series: Series, value: float, tags: Tags) -> None:
        key = _key(series, "histogram", tags)
        seen = self.observations.setdefault(key, Observations([0] * (len(series.boundaries) + 1)))
        seen.counts[bisect.bisect_left(series.boundaries, value)] += 1
        seen.total += value

    def value(self, series: Series, **tags: str) -> float:
        """A counter's or gauge's value with exactly these tags; 0 when never touched."""
        return self.values.get((series.name, tuple(sorted(tags.items()))), 0.0)

    def observed(self, series: Series, **tags: str) -> Observations:
        """A histogram with exactly these tags; empty when never touched."""
        empty = Observations([0] * (len(series.boundaries) + 1))
        return self.observations.get((series.name, tuple(sorted(tags.items()))), empty)


def _key(series: Series, kind: Kind, tags: Tags) -> tuple[str, Labels]:
    assert series.kind == kind, f"{series.name} is a {series.kind}, not a {kind}"
    assert set(tags) == set(series.tags), f"{series.name} takes the tags {series.tags}, not {tuple(tags)}"
    return series.name, tuple(sorted(tags.items()))


# Seconds. The GenAI conventions' buckets, finer below and further above.
# fmt: off
DURATION_S = (
    0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96,
    81.92, 163.84, 327.68,
)
TTFT_S = (
    0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0,
)
TIME_PER_OUTPUT_TOKEN_S = (
    0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5,
    0.75, 1.0, 2.5,
)
STEP_S = (
    0.0005, 0.001, 0.002, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.03, 0.04, 0.06, 0.08, 0.12, 0.16, 0.25,
    0.5, 1.0, 2.0, 4.0,
)
BATCH_SEQUENCES = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 512)
# fmt: on

REPLICA_TAGS = ("region", "replica")
SERVED_TAGS = ("model", "region")  # the region whose replica served it; "none" where none did


def _counter(name: str, unit: str, description: str, tags: tuple[str, ...]) -> Series:
    return Series(f"searoom_{name}", "counter", description, unit, tags)


def _gauge(name: str, unit: str, description: str, tags: tuple[str, ...]) -> Series:
    return Series(f"searoom_{name}", "gauge", description, unit, tags)


def _histogram(
    name: str, unit: str, description: str, tags: tuple[str, ...], boundaries: Sequence[float]
) -> Series:
    return Series(f"searoom_{name}", "histogram", description, unit, tags, tuple(boundaries))


# Ingress: what clients see.
REQUESTS = _counter(
    "requests",
    "1",
    "Requests that ended, by outcome: a finish reason, or an error's code.",
    ("model", "region", "outcome"),
)
TTFT = _histogram(
    "ttft_seconds", "s", "From a request's arrival to its first token, at Ingress.", SERVED_TAGS, TTFT_S
)
TIME_PER_OUTPUT_TOKEN = _histogram(
    "time_per_output_token_seconds",
    "s",
    "Mean time between a request's tokens after the first.",
    SERVED_TAGS,
    TIME_PER_OUTPUT_TOKEN_S,
)
REQUEST_DURATION = _histogram(
    "request_duration_seconds",
    "s",
    "From a request's arrival to its end.",
    SERVED_TAGS,
    DURATION_S,
)
PROMPT_TOKENS = _counter("prompt_tokens", "tokens", "Prompt tokens of ended requests.", SERVED_TAGS)
CACHED_TOKENS = _counter("cached_tokens", "tokens", "Of them, found in a prefix cache.", SERVED_TAGS)
OUTPUT_TOKENS = _counter("output_tokens", "tokens", "Tokens generated for ended requests.", SERVED_TAGS)
INGRESS_SERIES = (
    REQUESTS,
    TTFT,
    TIME_PER_OUTPUT_TOKEN,
    REQUEST_DURATION,
    PROMPT_TOKENS,
    CACHED_TOKENS,
    OUTPUT_TOKENS,
)

# Router.
ROUTER_PICKS = _counter("router_picks", "1", "Requests sent to a replica, by its region.", ("region",))
WAITING = _gauge("router_waiting_requests", "1", "Requests waiting in the Router for headroom.", ())
REPLICAS_KNOWN = _gauge("replicas_known", "1", "Replicas in Serve's running set.", ())
ROUTER_SERIES = (ROUTER_PICKS, WAITING, REPLICAS_KNOWN)

# ModelReplica. Its KV blocks: used + evictable + free = total; reserved ones are promised, not yet used.
REFUSALS = _counter("refusals", "1", "Submissions refused for want of headroom.", REPLICA_TAGS)
KV_BLOCKS_USED = _gauge("kv_blocks_used", "blocks", "KV blocks that running requests read.", REPLICA_TAGS)
KV_BLOCKS_FREE = _gauge("kv_blocks_free", "blocks", "KV blocks that hold nothing.", REPLICA_TAGS)
KV_BLOCKS_EVICTABLE = _gauge(
    "kv_blocks_evictable", "blocks", "KV blocks cached for a later prefix, with no reader.", REPLICA_TAGS
)
KV_BLOCKS_RESERVED = _gauge(
    "kv_blocks_reserved",
    "blocks",
    "KV blocks promised to accepted requests.",
    REPLICA_TAGS,
)
PREFIX_HIT_TOKENS = _counter(
    "prefix_hit_tokens", "tokens", "Prompt tokens found in the prefix cache.", REPLICA_TAGS
)
HOST_HIT_TOKENS = _counter(
    "host_hit_tokens", "tokens", "Of these, brought back from host memory.", REPLICA_TAGS
)
PREFIX_QUERY_TOKENS = _counter(
    "prefix_query_tokens", "tokens", "Prompt tokens looked up in the prefix cache.", REPLICA_TAGS
)
ASLEEP = _gauge("asleep", "1", "1 while the replica has given its GPU's memory back.", REPLICA_TAGS)
PREEMPTIONS = _counter(
    "preemptions", "1", "Sequences that lost their blocks to others and started over.", REPLICA_TAGS
)
BATCH_SIZE = _histogram("batch_sequences", "1", "Sequences in a step.", REPLICA_TAGS, BATCH_SEQUENCES)
STEP_TIME = _histogram("step_seconds", "s", "Measured time of a step.", REPLICA_TAGS, STEP_S)
STEP_TIME_PREDICTED = _histogram(
    "step_predicted_seconds", "s", "The step-time model's prediction of the same step.", REPLICA_TAGS, STEP_S
)
FLOPS = _counter("flops", "FLOP", "Floating-point operations of steps, by the step-time model.", REPLICA_TAGS)
BYTES_MOVED = _counter(
    "memory_moved_bytes", "By", "Bytes that steps read and wrote, by the step-time model.", REPLICA_TAGS
)
ARITHMETIC_INTENSITY = _gauge(
    "arithmetic_intensity_flop_per_byte", "FLOP/By", "FLOP a byte moved in the last step.", REPLICA_TAGS
)
RIDGE_POINT = _gauge(
    "ridge_point_flop_per_byte",
    "FLOP/By",
    "The arithmetic intensity above which compute binds: the machine's measured FLOP/s over bytes/s.",
    REPLICA_TAGS,
)
COMPUTE_BOUND = _gauge(
    "compute_bound", "1", "1 when compute bound the last step, 0 when memory did.", REPLICA_TAGS
)
ROOFLINE_RATIO = _gauge(
    "roofline_ratio",
    "1",
    "The least time the machine's rates allow the last step, over what it took.",
    REPLICA_TAGS,
)
REPLICA_SERIES = (
    REFUSALS,
    KV_BLOCKS_USED,
    KV_BLOCKS_FREE,
    KV_BLOCKS_EVICTABLE,
    KV_BLOCKS_RESERVED,
    PREFIX_HIT_TOKENS,
    HOST_HIT_TOKENS,
    PREFIX_QUERY_TOKENS,
    ASLEEP,
    PREEMPTIONS,
    BATCH_SIZE,
    STEP_TIME,
    STEP_TIME_PREDICTED,
    FLOPS,
    BYTES_MOVED,
    ARITHMETIC_INTENSITY,
    RIDGE_POINT,
    COMPUTE_BOUND,
    ROOFLINE_RATIO,
)

# GPUs of a node, from cluster.telemetry. `gpu` is the index NVML gives it.
GPU_TAGS = ("region", "node", "gpu")
GPU_BUSY = _gauge("gpu_busy_ratio", "1", "Share of the last sample period in which a kernel ran.", GPU_TAGS)
GPU_MEMORY_USED = _gauge("gpu_memory_used_bytes", "By", "GPU memory in use.", GPU_TAGS)
GPU_MEMORY_TOTAL = _gauge("gpu_memory_total_bytes", "By", "GPU memory there is.", GPU_TAGS)
GPU_TEMPERATURE = _gauge("gpu_temperature_celsius", "Cel", "Temperature of the GPU's core.", GPU_TAGS)
GPU_POWER = _gauge("gpu_power_watts", "W", "Power the GPU draws.", GPU_TAGS)
GPU_ECC_UNCORRECTED = _gauge(
    "gpu_ecc_uncorrected_errors", "1", "Uncorrected memory errors since the driver was loaded.", GPU_TAGS
)
GPU_SICK = _gauge("gpu_sick", "1", "1 when the GPU should get no more work.", GPU_TAGS)
GPU_SERIES = (
    GPU_BUSY,
    GPU_MEMORY_USED,
    GPU_MEMORY_TOTAL,
    GPU_TEMPERATURE,
    GPU_POWER,
    GPU_ECC_UNCORRECTED,
    GPU_SICK,
)

ALL_SERIES = (*INGRESS_SERIES, *ROUTER_SERIES, *REPLICA_SERIES, *GPU_SERIES)
