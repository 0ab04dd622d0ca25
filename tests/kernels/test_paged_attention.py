"""Paged attention against the formula, and against itself cut differently."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import paged_attention as subject
from kernels.paged_attention import paged_attention, paged_attention_reference, plan_attention, write_kv

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}


class Pool:
    """A cache full of NaN, and sequences whose blocks are scattered over it."""

    def __init__(
        self,
        num_heads,
        num_kv_heads,
        head_dim,
        block_tokens,
        dtype=torch.float32,
        num_blocks=64,
        cache_dtype=None,
        window=None,
    ):
        self.generator = torch.Generator().manual_seed(0)
        self.heads, self.dtype = (num_heads, num_kv_heads, head_dim), dtype
        shape = (2, num_blocks, num_kv_heads, block_tokens, head_dim)
        self.cache = torch.full(shape, float("nan"), dtype=dtype).to(cache_dtype or dtype)
        self.window = window
        self.block_tokens = block_tokens
        self.free = np.random.default_rng(0).permutation(num_blocks).tolist()

    def random(self, tokens, heads):
        return torch.randn(tokens, heads, self.heads[2], generator=self.generator).to(self.dtype)

    def tables(self, contexts):
        """Block tables wide enough for `contexts`, padded with 0."""
        counts = [-(-context // self.block_tokens) for context in contexts]
        tables = np.zeros((len(contexts), max(counts) + 1), dtype=np.int32)
        for row, count in zip(tables, counts, strict=True):
            row[:count] = [self.free.pop() for _ in range(count)]
        return tables

    def step(self, spans, tables, query, key, value):
        """Write and attend for `spans` [(start, end)], one a sequence; returns what plan and out were."""
        slots = np.concatenate(
            [
                table[np.arange(*span) // self.block_tokens] * self.block_tokens
                + np.arange(*span) % self.block_tokens
                for span, table in zip(spans, tables, strict=True)
            ]
        ).astype(np.int32)
        query_start = np.cumsum([0] + [end - start for start, end in spans]).astype(np.int32)
        contexts = np.array([end for _, end in spans], dtype=np.int32)
        batch = plan_attention(slots, query_start, contexts, tables, cache=self.cache, dtype=self.dtype)
        write_kv(self.cache, key, value, batch.slots)
        return paged_attention(query, self.cache, batch, window=self.window), (query_start, contexts, tables)

    def fill(self, contexts, tables):
        """Write random keys and values of `contexts` tokens."""
        total = sum(contexts)
        spans = [(0, context) for context in contexts if context]
        kept = tables[[i for i, context in enumerate(contexts) if context]]
        if total:
            heads, kv_heads, _ = self.heads
            self.step(
                spans,
                kept,
                self.random(total, heads),
                self.random(total, kv_heads),
                self.random(total, kv_heads),
            )


def check(pool, spans):
    """One step over `spans`, after their earlier tokens, equals the formula."""
    tables = pool.tables([end for _, end in spans])
    pool.fill([start for start, _ in spans], tables)
    total = sum(end - start for start, end in spans)
    heads, kv_heads, _ = pool.heads
    query = pool.random(total, heads)
    out, plan = pool.step(spans, tables, query, pool.random(total, kv_heads), pool.random(total, kv_heads))
    expected = paged_attention_reference(query, pool.cache.to(pool.dtype), *plan, window=pool.window)
    tolerance = TOLERANCE[pool.dtype]
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("heads", [(1, 1, 2), (6, 2, 10), (9, 3, 64), (4, 4, 16)])
def test_a_mixed_step_is_the_formula(heads, dtype):
    """Whole prompts, chunks behind a context and decodes of any length share one step."""
    pool = Pool(*heads, block_tokens=4, dtype=dtype)
    check(pool, [(0, 5), (7, 8), (3, 9), (0, 1), (12, 13), (15, 16), (8, 12), (30, 31)])


@settings(max_examples=25, deadline=None)
@given(
    spans=st.lists(
        st.tuples(st.integers(0, 9), st.integers(1, 6)).map(lambda span: (span[0], sum(span))),
        min_size=1,
        max_size=5,
    ),
    block_tokens=st.sampled_from([1, 3, 8]),
    heads=st.sampled_from([(3, 1, 4), (2, 2, 6)]),
    window=st.sampled_from([None, 1, 2, 5, 8, 40]),
)
def test_any_batch_is_the_formula(spans, block_tokens, heads, window):
    """Whatever is batched, each token sees exactly its own sequence up to itself, within the window."""
    check(Pool(*heads, block_tokens, num_blocks=128, window=window), spans)


@pytest.mark.parametrize("window", [None, 4])
def test_an_e4m3_cache_is_the_formula_over_what_it_holds(window):
    """Keys and values are rounded as they are written, and then attended to as they were rounded."""
    pool = Pool(6, 2, 16, block_tokens=4, cache_dtype=torch.float8_e4m3fn, window=window)
    check(pool, [(0, 5), (7, 8), (3, 9), (0, 1), (12, 13)])


@pytest.mark.parametrize("window", [None, 7])
def test_decodes_are_the_formula_across_groups(monkeypatch, window):
    """Cutting decodes into groups by length and memory changes nothing."""
    monkeypatch.setattr(subject, "_GROUP_TOKENS", 16)
    check(
        Pool(6, 2, 8, block_tokens=4, window=window), [(n, n + 1) for n in (0, 3, 4, 5, 11, 12, 19, 19, 19)]
    )


@pytest.mark.parametrize("window", [None, 6])
def test_a_tiled_chunk_is_the_formula(monkeypatch, window):
    """A chunk whose mask would be too large is cut into rows, the last of them fewer."""
    monkeypatch.setattr(subject, "_MASK_ENTRIES", 60)
    check(Pool(6, 2, 8, block_tokens=4, window=window), [(9, 20), (2, 3), (1, 12)])


@pytest.mark.parametrize("cuts", [(13,), (4, 13), (1, 2, 3, 13), (5, 6, 13), tuple(range(1, 14))])
def test_chunked_prefill_is_one_prefill(cuts):
    """However a prompt is cut into chunks, its tokens get the same attention."""
    pool = Pool(6, 2, 16, block_tokens=4)
    query, key, value = pool.random(13, 6), pool.random(13, 2), pool.random(13, 2)
    whole, _ = pool.step([(0, 13)], pool.tables([13]), query, key, value)
    tables, start, parts = pool.tables([13]), 0, []
    for end in cuts:
        rows = slice(start, end)
        parts.append(pool.step([(start, end)], tables, query[rows], key[rows], value[rows])[0])
        start = end
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-5, atol=1e-6)


def test_a_broken_neighbour_stays_alone():
    """NaN that another sequence left in freed blocks, or in block 0, never reaches a sequence."""
    pool = Pool(4, 2, 8, block_tokens=4)  # the whole cache is NaN where nothing was written
    tables = pool.tables([30, 3])
    assert 0 not in tables[1, :1]
    pool.fill([29, 2], tables)
    out, _ = pool.step([(29, 30), (2, 3)], tables, pool.random(2, 4), pool.random(2, 2), pool.random(2, 2))
    assert out.isfinite().all()
