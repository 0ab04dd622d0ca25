import hashlib

from hypothesis import given, settings
from hypothesis import strategies as st

from serving.block_hash import HASH_BYTES, hash_block, hash_blocks, hash_root

TOKENS = st.lists(st.integers(0, 2**31 - 1), max_size=40)


def test_a_block_hash_is_blake2b_of_its_parent_and_little_endian_ids():
    """Written out with hashlib and bytes alone, the chain has the same hashes."""
    root = hash_root("model", "v1", "bfloat16", "salt")
    ids = [1, 256, 49151, 7]
    first = hashlib.blake2b(root + b"\x01\0\0\0" + b"\0\x01\0\0", digest_size=16).digest()
    second = hashlib.blake2b(
        first + (49151).to_bytes(4, "little") + (7).to_bytes(4, "little"), digest_size=16
    ).digest()
    assert hash_blocks(root, ids, block_tokens=2) == (first, second)


def test_the_root_is_the_same_on_every_machine_and_in_every_release():
    """A fixed quadruple has a fixed root: replicas of two releases would share caches by it."""
    parts = (b"model", b"v1", b"bfloat16", b"salt")
    framed = b"".join(len(part).to_bytes(4, "little") + part for part in parts)
    expected = hashlib.blake2b(framed, digest_size=HASH_BYTES).digest()
    assert hash_root("model", "v1", "bfloat16", "salt") == expected


def test_moving_a_character_between_the_parts_changes_the_root():
    """No two quadruples meet by concatenation, so no tenant reaches another's blocks that way."""
    roots = {
        hash_root(*parts) for parts in [("ab", "c", "d", ""), ("a", "bc", "d", ""), ("ab", "c", "", "d")]
    }
    assert len(roots) == 3


@settings(max_examples=60, deadline=None)
@given(TOKENS, st.integers(1, 7))
def test_the_chain_can_be_grown_block_by_block(tokens, block_tokens):
    """`hash_blocks` of the whole equals `hash_block` from parent to child; partial blocks have none."""
    parent, hashes = b"root", []
    for index in range(len(tokens) // block_tokens):
        parent = hash_block(parent, tokens[index * block_tokens : (index + 1) * block_tokens])
        hashes.append(parent)
    assert hash_blocks(b"root", tokens, block_tokens) == tuple(hashes)


@settings(max_examples=60, deadline=None)
@given(TOKENS.filter(lambda tokens: len(tokens) >= 4), st.data())
def test_a_changed_token_changes_its_block_and_all_after_it_only(tokens, data):
    """A hash names everything up to its block's end, and nothing past it."""
    at = data.draw(st.integers(0, len(tokens) - 1))
    changed = [*tokens[:at], (tokens[at] + 1) % 2**31, *tokens[at + 1 :]]
    before, after = hash_blocks(b"r", tokens, 2), hash_blocks(b"r", changed, 2)
    same = [a == b for a, b in zip(before, after, strict=True)]
    assert same == [index < at // 2 for index in range(len(before))]
