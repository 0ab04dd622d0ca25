"""The prefix index: exact when told everything, honest about gaps, bounded, and never of another epoch."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.messages import BlockEvents, BlockRemoved, BlockSnapshot, BlockStored
from serving.prefix_index import EXPECTED_S, PrefixIndex

NOW = 1_000.0


def chain(name: str, length: int) -> tuple[bytes, ...]:
    return tuple(f"{name}{index}".encode() for index in range(length))


def stored(first_number: int, *hashes: bytes) -> BlockEvents:
    return BlockEvents(first_number=first_number, events=tuple(BlockStored(h, b"root") for h in hashes))


def depths(index: PrefixIndex, hashes: tuple[bytes, ...], rows: int = 4, now: float = NOW) -> list[int]:
    index.check_integrity()
    return index.match(hashes, rows, now).tolist()


def test_each_replica_matches_as_far_as_it_goes() -> None:
    """Four replicas hold 5, 2, 5 and no blocks of a prompt of 9."""
    index, prompt = PrefixIndex(), chain("a", 9)
    for row, length in ((0, 5), (1, 2), (2, 5)):
        assert index.apply(row, 1, stored(1, *prompt[:length]))
    assert depths(index, prompt) == [5, 2, 5, 0]
    assert depths(index, chain("b", 9)) == [0, 0, 0, 0]
    assert depths(index, ()) == [0, 0, 0, 0]


def test_evicted_blocks_shorten_the_match() -> None:
    index, prompt = PrefixIndex(), chain("a", 4)
    index.apply(0, 1, stored(1, *prompt))
    index.apply(0, 1, BlockEvents(first_number=5, events=(BlockRemoved(prompt[3]), BlockRemoved(prompt[2]))))
    assert depths(index, prompt) == [2, 0, 0, 0]


def test_a_gap_asks_for_a_snapshot_and_the_snapshot_mends_it() -> None:
    """Event 3 is missing: False until a snapshot comes; events that it includes are not applied again."""
    index, prompt = PrefixIndex(), chain("a", 6)
    assert index.apply(0, 1, stored(1, *prompt[:2]))
    assert not index.apply(0, 1, stored(4, b"x"))
    assert depths(index, prompt) == [2, 0, 0, 0]
    assert index.apply(0, 1, BlockSnapshot(last_number=5, block_hashes=prompt[:5]))
    assert depths(index, prompt) == [5, 0, 0, 0]
    assert index.apply(0, 1, stored(4, b"long gone", b"x"))
    assert depths(index, (b"long gone",)) == [0, 0, 0, 0]
    assert index.apply(0, 1, stored(6, prompt[5]))
    assert depths(index, prompt) == [6, 0, 0, 0]


def test_who_is_heard_of_for_the_first_time_in_the_middle_has_a_gap() -> None:
    """A new Router has none of a replica's past."""
    assert not PrefixIndex().apply(0, 1, stored(100, b"x"))


def test_a_new_process_has_an_empty_cache_and_the_old_ones_news_is_ignored() -> None:
    index, prompt = PrefixIndex(), chain("a", 3)
    index.apply(0, 1, stored(1, *prompt))
    assert index.apply(0, 2, stored(1, prompt[0]))
    assert index.apply(0, 1, stored(4, *prompt[1:]))
    assert depths(index, prompt) == [1, 0, 0, 0]


def test_what_was_routed_is_expected_until_it_is_over() -> None:
    """The longest common beginning with a routed prompt counts; a replica that is gone expects nothing."""
    index, prompt = PrefixIndex(), chain("a", 8)
    index.expect(1, prompt[:6], NOW)
    index.expect(2, (*prompt[:3], b"other"), NOW)
    assert depths(index, prompt) == [0, 6, 3, 0]
    index.forget(1)
    assert depths(index, prompt) == [0, 0, 3, 0]
    assert depths(index, prompt, now=NOW + EXPECTED_S) == [0, 0, 0, 0]


def test_what_a_replica_turned_away_is_not_expected_of_it() -> None:
    """Nor does taking it back touch what another request, or another replica, is expected to leave."""
    index, prompt, longer = PrefixIndex(), chain("a", 8), chain("a", 12)
    for row in (1, 2):
        index.expect(row, prompt, NOW)
    index.withdraw(1, prompt)
    assert depths(index, prompt) == [0, 0, 8, 0]
    index.expect(2, longer, NOW)
    index.withdraw(2, prompt)
    assert depths(index, longer) == [0, 0, 12, 0]
    index.withdraw(3, prompt)  # never expected there


def test_memory_is_bounded() -> None:
    """At its limit it takes nothing in; what is evicted makes room."""
    index, prompt = PrefixIndex(max_blocks=3), chain("a", 5)
    index.apply(0, 1, stored(1, *prompt))
    assert index.num_blocks == 3 and depths(index, prompt) == [3, 0, 0, 0]
    index.forget(0)
    assert index.num_blocks == 0


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 69), st.sampled_from("ab"), st.integers(0, 20)), min_size=1, max_size=80
    ),
    st.sampled_from("ab"),
    st.integers(0, 20),
)
def test_matches_are_those_of_a_plain_walk(
    holdings: list[tuple[int, str, int]], name: str, length: int
) -> None:
    """Seventy replicas, prefix-closed caches: bisection finds what walking every block finds."""
    index = PrefixIndex()
    held: dict[int, set[bytes]] = {}
    for row, chain_name, blocks in holdings:
        held.setdefault(row, set()).update(chain(chain_name, blocks))
    for row, hashes in held.items():
        index.apply(row, 1, BlockSnapshot(last_number=9, block_hashes=tuple(sorted(hashes))))
    prompt = chain(name, length)
    plain = np.zeros(70, dtype=int)
    for row, hashes in held.items():
        while plain[row] < length and prompt[plain[row]] in hashes:
            plain[row] += 1
    assert depths(index, prompt, rows=70) == plain.tolist()
