"""The trees and lists in which the peers' routers remember what they sent."""

from collections import OrderedDict

from hypothesis import given, settings
from hypothesis import strategies as st

from serving.bench.router.baseline_trees import LruBlocks, PrefixTree

TEXTS = st.text("ab", max_size=10)
SENT = st.lists(st.tuples(TEXTS, st.sampled_from("XYZ")), max_size=25)


def tree_of(sent):
    tree = PrefixTree()
    for holder in "XYZ":
        tree.add(holder)
    for text, holder in sent:
        tree.insert(text, holder)
        tree.check_integrity()
    return tree


def prefixes_of(sent, holder):
    return {text[:end] for text, to in sent if to == holder for end in range(1, len(text) + 1)}


@settings(max_examples=150, deadline=None)
@given(SENT, TEXTS)
def test_a_match_is_the_longest_prefix_anybody_was_sent(sent, text):
    """Its holders are exactly those who were sent all of it."""
    match = tree_of(sent).match(text)
    had = {holder: prefixes_of(sent, holder) for holder in "XYZ"}
    everyone = set.union(*had.values())
    assert match.length == max((end for end in range(len(text) + 1) if text[:end] in everyone), default=0)
    whole = {holder for holder in "XYZ" if match.length == 0 or text[: match.length] in had[holder]}
    assert set(match.holders) == whole


@settings(max_examples=100, deadline=None)
@given(SENT, TEXTS, st.sets(st.sampled_from("XYZ"), min_size=1))
def test_among_some_a_match_is_the_longest_they_were_sent(sent, text, among):
    """Nobody else's prefixes make it longer."""
    match = tree_of(sent).match(text, among)
    alone = tree_of([(t, to) for t, to in sent if to in among]).match(text, among)
    assert match.length >= alone.length  # nodes are cut where others part, and counted whole or not
    had = set.union(*(prefixes_of(sent, holder) for holder in among))
    assert text[: match.length] in had or match.length == 0


@settings(max_examples=100, deadline=None)
@given(SENT)
def test_a_tree_is_as_large_as_the_different_prefixes_it_was_sent(sent):
    tree = tree_of(sent)
    assert {h: tree.size(h) for h in "XYZ"} == {h: len(prefixes_of(sent, h)) for h in "XYZ"}


@settings(max_examples=100, deadline=None)
@given(SENT, st.integers(0, 20), st.booleans())
def test_eviction_comes_below_the_bound_and_no_one_gains(sent, bound, shared):
    """For each replica, or for all of them together."""
    tree = tree_of(sent)
    before = {holder: tree.size(holder) for holder in "XYZ"}
    tree.evict(bound, shared)
    tree.check_integrity()
    after = {holder: tree.size(holder) for holder in "XYZ"}
    if shared:
        assert sum(after.values()) <= bound
    else:
        assert all(after[holder] <= bound for holder in "XYZ")
        assert all(after[holder] == before[holder] for holder in "XYZ" if before[holder] <= bound)


def test_the_least_recently_used_leaf_goes_first():
    tree = tree_of([("aaaa", "X"), ("bbbb", "X"), ("aaaa", "X")])
    tree.evict(4)
    assert tree.match("aaaa").length == 4
    assert tree.match("bbbb").length == 0


def test_the_first_to_be_sent_a_prefix_is_named_first():
    """That is whom SGLang's router chooses of several, also after the node was split."""
    tree = tree_of([("aaab", "Y"), ("aaab", "X"), ("aaac", "X")])
    assert tree.match("aaab").holders == ("Y", "X")
    assert tree.match("aaa").holders == ("Y", "X")
    assert tree.match("aaac").holders == ("X",)


def test_who_is_gone_matches_nothing():
    tree = tree_of([("aaab", "X"), ("aab", "Y")])
    tree.remove("X")
    tree.check_integrity()
    assert tree.match("aaab").holders == ("Y",)
    assert tree.match("aaab").length == 2
    assert tree.size("X") == 0


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 6), st.integers(1, 6), st.sampled_from("XY")), max_size=20),
    st.integers(1, 8),
)
def test_lists_keep_the_last_blocks_of_each_replica(sent, capacity):
    """As one ordered list a replica would, and depths count the first blocks without a gap."""
    blocks, lists = LruBlocks(), {"X": OrderedDict(), "Y": OrderedDict()}
    for start, length, holder in sent:
        hashes = [bytes([n]) for n in range(start, start + length)]
        blocks.insert(hashes, holder, capacity)
        for block_hash in hashes:
            lists[holder].pop(block_hash, None)
            lists[holder][block_hash] = None
            if len(lists[holder]) > capacity:
                lists[holder].popitem(last=False)
    asked = [bytes([n]) for n in range(8)]
    depths = blocks.match(asked)
    for holder, kept in lists.items():
        depth = next((n for n, block_hash in enumerate(asked) if block_hash not in kept), len(asked))
        assert depths.get(holder, 0) == depth
