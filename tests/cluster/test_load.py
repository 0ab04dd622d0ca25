"""A replica's load, and the sums over a region."""

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.load import ReplicaLoad, StepCoefficients, by_region
from tests.cluster.load_cases import a_load

counts = st.integers(0, 1000)
loads = st.builds(
    ReplicaLoad,
    replica_id=st.text("abc", min_size=1, max_size=3),
    model=st.just("m"),
    region=st.sampled_from(["us-east", "eu-west", "ap-south"]),
    epoch=counts,
    sequence=counts,
    last_submission=counts,
    blocks_total=counts,
    blocks_free=counts,
    blocks_evictable=counts,
    blocks_reserved=counts,
    num_running=counts,
    num_waiting=counts,
    prefill_backlog_tokens=counts,
    decode_kv_tokens=counts,
    step=st.builds(StepCoefficients, *[st.floats(0, 10)] * 3),
    max_step_tokens=counts,
    max_num_seqs=counts,
    num_observations=counts,
    draining=st.booleans(),
)


@given(loads)
@settings(max_examples=50, deadline=None)
def test_a_load_is_the_same_after_the_wire(load: ReplicaLoad) -> None:
    """Replica and Router read the same figures, the coefficients' array included."""
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(load), type=ReplicaLoad) == load


@given(st.lists(loads, max_size=8))
@settings(max_examples=50, deadline=None)
def test_regions_lose_no_block(fleet: list[ReplicaLoad]) -> None:
    """Blocks and requests summed a region are those summed over all replicas; every region is there once."""
    regions = by_region(fleet)
    assert [region.region for region in regions] == sorted({load.region for load in fleet})
    assert sum(region.num_replicas for region in regions) == len(fleet)
    for name in ("blocks_total", "room_blocks", "num_running", "num_waiting", "prefill_backlog_tokens"):
        assert sum(getattr(region, name) for region in regions) == sum(getattr(load, name) for load in fleet)


def test_room_is_what_a_new_request_can_count_on() -> None:
    """Free and evictable blocks less the promised ones, below zero when promises outgrew the pool."""
    assert _load(free=10, evictable=5, reserved=4).room_blocks == 11
    assert _load(free=1, evictable=0, reserved=4).room_blocks == -3


def test_a_step_costs_its_base_its_tokens_and_the_context_it_reads() -> None:
    """4 ms + 100 tokens at 0.05 ms + 2,000 context tokens at 0.001 ms = 11 ms."""
    assert StepCoefficients(4.0, 0.05, 0.001).predict_ms(100, 2000) == 11.0


def _load(free: int, evictable: int, reserved: int) -> ReplicaLoad:
    return a_load(blocks_free=free, blocks_evictable=evictable, blocks_reserved=reserved)
