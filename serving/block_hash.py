"""The one hash of KV blocks: Ingress, engine and router index agree on it bit for bit.

    root    = blake2b(model ‖ weight version ‖ KV dtype ‖ tenant salt)
    hash[i] = blake2b(hash[i-1] ‖ int32-LE token ids of block i)          16 bytes each

A block's hash therefore names its tokens, everything before them, and whose they are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

HASH_BYTES = 16


def hash_root(model: str, weight_version: str, kv_dtype: str, tenant_salt: str) -> bytes:
    """The chain's root. Parts are length-prefixed, so no two different quadruples meet."""
    digest = hashlib.blake2b(digest_size=HASH_BYTES)
    for part in (model, weight_version, kv_dtype, tenant_salt):
        encoded = part.encode()
        digest.update(len(encoded).to_bytes(4, "little"))
        digest.update(encoded)
    return digest.digest()


def hash_block(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """Hash of one full block whose predecessor hashes to `parent`."""
    tokens = np.asarray(token_ids, dtype="<i4").tobytes()
    return hashlib.blake2b(parent + tokens, digest_size=HASH_BYTES).digest()


def hash_blocks(root: bytes, token_ids: Sequence[int], block_tokens: int) -> tuple[bytes, ...]:
    """Hashes of every full block of `token_ids`; a partial last block has none."""
    hashes = []
    parent = root
    for end in range(block_tokens, len(token_ids) + 1, block_tokens):
        parent = hash_block(parent, token_ids[end - block_tokens : end])
        hashes.append(parent)
    return tuple(hashes)
