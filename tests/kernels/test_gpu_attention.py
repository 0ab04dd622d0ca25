"""The Triton kernels of paged attention against the formula: on a GPU, or in the interpreter."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.attention_worklist import (
    QUERY_BLOCK,
    SPLIT_TOKENS,
    BatchCapacity,
    GpuAttentionBatch,
    pack_attention,
)
from kernels.dispatch import forced
from kernels.paged_attention import paged_attention, paged_attention_reference, plan_attention, write_kv
from kernels.rope_kv import rope_and_write_kv

# The interpreter does bfloat16 arithmetic on its bits; the GPU has no kernels for float32.
DTYPES = [torch.float16, torch.bfloat16 if torch.cuda.is_available() else torch.float32]
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float32: 2e-6}


@dataclass
class Step:
    """Sequences whose blocks lie scattered over a cache that is NaN wherever they wrote nothing."""

    query: torch.Tensor
    cache: torch.Tensor
    query_start: np.ndarray
    context_lens: np.ndarray
    block_tables: np.ndarray

    @property
    def plan(self):
        return self.query_start, self.context_lens, self.block_tables

    def out(self, window=None, **scales):
        with forced("triton"):
            slots = np.zeros(len(self.query), dtype=np.int32)
            batch = plan_attention(slots, *self.plan, cache=self.cache, dtype=self.query.dtype)
            return paged_attention(self.query, self.cache, batch, window=window, **scales)

    def only(self, b):
        """The step of sequence b alone."""
        start, end = self.query_start[b : b + 2]
        query_start = np.array([0, end - start], dtype=np.int32)
        rows, alone = slice(start, end), slice(b, b + 1)
        return rows, Step(
            self.query[rows], self.cache, query_start, self.context_lens[alone], self.block_tables[alone]
        )

    def check(self, window=None):
        out = self.out(window)
        expected = paged_attention_reference(self.query.cpu(), self.cache.cpu(), *self.plan, window)
        tolerance = TOLERANCE[self.query.dtype]
        torch.testing.assert_close(out.cpu(), expected, rtol=tolerance, atol=tolerance)


def step(spans, heads, device, dtype=DTYPES[1], block_tokens=16, window=None, seed=0):
    """A step for `spans` [(cached, new)] tokens, one a sequence; with a window, blocks before it are gone."""
    num_heads, num_kv_heads, head_dim = heads
    random, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    contexts = np.array([cached + new for cached, new in spans], dtype=np.int32)
    counts = -(-contexts // block_tokens)
    num_blocks = int(counts.sum()) + 1
    tables = np.zeros((len(spans), int(counts.max())), dtype=np.int32)
    cache = torch.full((2, num_blocks, num_kv_heads, block_tokens, head_dim), float("nan"), dtype=dtype)
    free = 1 + random.permutation(num_blocks - 1)  # block 0, which tables are padded with, is nobody's
    for b, (cached, new) in enumerate(spans):
        gone = max(0, cached + 1 - window) // block_tokens if window else 0
        mine, free = free[: counts[b]], free[counts[b] :]
        tables[b, gone : counts[b]] = mine[gone:]
        written = torch.randn(2, cached + new, num_kv_heads, head_dim, generator=generator).to(dtype)
        for at in range(gone, counts[b]):
            part = written[:, at * block_tokens : (at + 1) * block_tokens]
            cache[:, mine[at], :, : part.shape[1]] = part.transpose(1, 2)
    new_tokens = [new for _, new in spans]
    query = torch.randn(sum(new_tokens), num_heads, head_dim, generator=generator).to(dtype)
    query_start = np.cumsum([0, *new_tokens]).astype(np.int32)
    return Step(query.to(device), cache.to(device), query_start, contexts, tables)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_a_mixed_step_is_the_formula(head_dim, dtype, device):
    """Whole prompts, chunks behind a context and decodes share one call, at every head dim."""
    spans = [(0, 5), (30, 1), (17, 3), (0, 1), (70, 2), (64, 1)]
    step(spans, (4, 2, head_dim), device, dtype).check()


@pytest.mark.parametrize("heads", [(2, 2, 64), (6, 2, 64), (4, 1, 64), (8, 1, 64), (40, 2, 64)])
def test_query_heads_share_keys(heads, device):
    """Groups of 1, 3, 4, 8 and 20 query heads, powers of two or not, read their own head's keys."""
    step([(3, 50), (40, 1), (0, 19), (9, 1)], heads, device).check()


@pytest.mark.parametrize("block_tokens", [16, 32, 128])
def test_decodes_at_every_border(block_tokens, device):
    """Contexts that end at, before and after a block's, a tile's and a split's end are whole."""
    borders = (1, 16, 32, 64, SPLIT_TOKENS, 2 * SPLIT_TOKENS)
    spans = [(max(0, border - 1 + by), 1) for border in borders for by in (-1, 0, 1)]
    step(spans, (2, 1, 64), device, block_tokens=block_tokens).check()


@pytest.mark.parametrize("cached", [0, 1, 62, 63, 130])
def test_chunks_at_every_border(cached, device):
    """Chunks that fill a tile, or a block of work, exactly, less one row or more one are whole."""
    lengths = (2, 42, 43, 64, QUERY_BLOCK - 1, QUERY_BLOCK, QUERY_BLOCK + 1)
    step([(cached, new) for new in lengths], (3, 1, 64), device).check()


def test_many_splits_are_merged(device):
    """A context of more splits than the merge takes at a time is whole, whichever of them weigh most."""
    whole = step([(18 * SPLIT_TOKENS + 7, 1), (5 * SPLIT_TOKENS, 1)], (1, 1, 64), device)
    whole.check()
    last = torch.from_numpy(whole.block_tables[0, -8:]).long()
    whole.cache[0, last] *= 3
    whole.check()


@pytest.mark.parametrize("window", [1, 5, 16, 64, 100, 513])
def test_a_window_hides_the_rest(window, device):
    """A token sees the last `window` positions, and the blocks before them are never read."""
    spans = [(0, 3), (200, 1), (90, 60), (130, 135), (1030, 1), (1100, 2), (15, 1), (511, 1)]
    step(spans, (2, 1, 64), device, window=window).check(window)


@settings(max_examples=12, deadline=None)
@given(
    spans=st.lists(st.tuples(st.integers(0, 80), st.integers(1, 40)), min_size=1, max_size=4),
    heads=st.sampled_from([(1, 1, 64), (6, 2, 80)]),
    window=st.none() | st.integers(1, 90),
)
def test_any_batch_is_the_formula(device, spans, heads, window):
    """Whatever is batched, each token sees exactly its own sequence up to itself."""
    step(spans, heads, device, window=window).check(window)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_batch_changes_no_bit(dtype, device):
    """A sequence alone and among others gets the same bits: splits do not depend on the batch."""
    whole = step([(700, 1), (100, 30), (3, 1), (1500, 1), (0, 150), (511, 1)], (6, 2, 64), device, dtype)
    out = whole.out()
    for b in range(len(whole.context_lens)):
        rows, alone = whole.only(b)
        assert torch.equal(alone.out(), out[rows])


@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("cuts", [(2, 150), (33, 130, 150), (64, 128, 150)])
def test_a_cut_prompt_changes_no_bit(cuts, window, device):
    """However a prompt is cut into chunks of two tokens or more, its tokens get the same bits."""
    whole = step([(0, 150)], (3, 1, 64), device)
    out = whole.out(window)
    start = 0
    for end in cuts:
        query_start = np.array([0, end - start], dtype=np.int32)
        context = np.array([end], dtype=np.int32)
        part = Step(whole.query[start:end], whole.cache, query_start, context, whole.block_tables)
        assert torch.equal(part.out(window), out[start:end])
        start = end


def test_strided_queries_are_read_in_place(device):
    """Queries may be the first heads of a fused projection."""
    whole = step([(20, 3), (40, 1)], (4, 2, 64), device)
    fused = torch.full((4, 8, 64), float("nan"), dtype=whole.query.dtype, device=device)
    fused[:, :4] = whole.query
    strided = Step(fused[:, :4], whole.cache, *whole.plan)
    assert torch.equal(strided.out(), whole.out())


def test_a_narrow_cache_is_scaled(device):
    """An e4m3 cache with scales of keys and values is the formula over what it stands for."""
    if device == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no e4m3")
    whole = step([(20, 3), (600, 1)], (4, 2, 64), device, torch.float16)
    narrow = Step(whole.query, whole.cache.to(torch.float8_e4m3fn), *whole.plan)
    out = narrow.out(key_scale=0.5, value_scale=4.0)
    wide = narrow.cache.cpu().half() * torch.tensor([0.5, 4.0]).half().view(2, 1, 1, 1, 1)
    expected = paged_attention_reference(whole.query.cpu(), wide, *whole.plan)
    torch.testing.assert_close(out.cpu(), expected, rtol=4e-3, atol=4e-3)


def test_written_keys_are_the_ones_read(device):
    """`write_kv` puts a token's key and value where attention looks for them."""
    whole = step([(0, 20), (33, 1)], (4, 2, 64), device)
    cache = torch.full_like(whole.cache, float("nan"))
    positions = [*range(20), *range(34)]
    tables = np.repeat(whole.block_tables, [20, 34], axis=0)
    slots = tables[np.arange(54), np.array(positions) // 16] * 16 + np.array(positions) % 16
    blocks, offsets = torch.from_numpy(slots // 16).to(device), torch.from_numpy(slots % 16).to(device)
    keys, values = whole.cache[0, blocks, :, offsets], whole.cache[1, blocks, :, offsets]
    start = np.array([0, 20, 54], dtype=np.int32)
    with forced("triton"):
        batch = plan_attention(slots.astype(np.int32), start, *whole.plan[1:], cache=cache, dtype=cache.dtype)
        write_kv(cache, keys, values, batch.slots)
    torch.testing.assert_close(cache, whole.cache, rtol=0, atol=0, equal_nan=True)


def test_one_buffer_serves_any_step(device):
    """Of a buffer of fixed capacity the kernels do what the step in it asks, and nothing else."""
    capacity = BatchCapacity(3, 3, table_blocks=80, prefill_items=2, decode_items=9, merges=3)
    buffer = torch.empty(capacity.ints, dtype=torch.int32, device=device)
    batch = GpuAttentionBatch.view(buffer, capacity)
    for spans in ([(1100, 1), (5, 1), (600, 1)], [(9, 1), (0, 1), (30, 1)], [(0, 2), (513, 1)]):
        eager = step(spans, (2, 1, 64), device)
        plan = eager.plan
        if len(spans) == 2:  # a bucket of three sequences, of which one is empty
            plan = (np.append(plan[0], 3), np.append(plan[1], 0), np.pad(plan[2], ((0, 1), (0, 0))))
        array, _ = pack_attention(np.zeros(3, np.int32), *plan, capacity)
        packed = GpuAttentionBatch.view(torch.from_numpy(array), capacity)
        prefills, decodes, merges = packed.counts.tolist()
        # What an earlier step may have left, and would write where others do.
        packed.prefill_work[prefills:] = torch.tensor([2, 0])
        packed.decode_work[decodes:] = torch.tensor([1, 1, 0, 1])
        packed.merge_work[merges:] = 1
        buffer.copy_(torch.from_numpy(array))
        with forced("triton"):
            out = paged_attention(eager.query, eager.cache, batch)
        assert torch.equal(out, eager.out())


@pytest.mark.parametrize(
    "short", ["table_blocks", "decode_items", "merges", "prefill_items", "tokens", "sequences"]
)
def test_a_step_that_does_not_fit_is_refused(short):
    """A buffer too small for a step is an error that says so, never a truncated step."""
    whole = step([(1100, 1), (5, 140)], (2, 1, 64), "cpu")
    slots = np.zeros(141, np.int32)
    _, exact = pack_attention(slots, *whole.plan)
    sizes = {name: getattr(exact, name) for name in exact.__dataclass_fields__}
    with pytest.raises(ValueError, match="does not fit"):
        pack_attention(slots, *whole.plan, BatchCapacity(**{**sizes, short: sizes[short] - 1}))


def huge_cache(num_blocks, device, folder):
    """[2, num_blocks, 1, 16, 64]; on the host a sparse file: what nobody touches takes no memory."""
    shape = (2, num_blocks, 1, 16, 64)
    if device == "cuda":
        return torch.empty(shape, dtype=torch.float16, device=device)
    path, size = str(folder / "cache"), math.prod(shape)
    return torch.from_file(path, shared=True, size=size, dtype=torch.float16).view(shape)


@pytest.mark.parametrize("window", [None, 9])
def test_a_cache_beyond_32_bits_is_read_and_written_at_its_end(window, device, tmp_path):
    """Where an element's number is above 2^31, keys are those that were put there."""
    small = step([(20, 1), (3, 30), (600, 1)], (2, 1, 64), device, torch.float16)
    used = small.cache.shape[1]
    cache = huge_cache(2**21 + used, device, tmp_path)
    assert cache[0, 2**21 :].data_ptr() - cache.data_ptr() == 2 * 2**31
    shift = 2**21
    cache[:, shift:] = small.cache
    huge = Step(small.query, cache, *small.plan[:2], small.block_tables + np.int32(shift))
    assert torch.equal(huge.out(window), small.out(window))

    heads = torch.randn(2, 4, 64, generator=torch.Generator().manual_seed(0)).half().to(device)
    table = torch.ones(2, 1, 64, device=device)
    slots = torch.tensor(
        [used * 16 - 1, 16 * int(small.block_tables[0, 0])], dtype=torch.int32, device=device
    )
    with forced("triton"):
        rope_and_write_kv(heads, 2, table, table, small.cache, slots)
        rope_and_write_kv(heads, 2, table, table, cache, slots + 16 * shift)
    torch.testing.assert_close(cache[:, shift:], small.cache, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(small.cache[1, -1, 0, 15], heads[0, 3])


def test_what_the_kernels_cannot_read_is_refused(device):
    """Other head dims, block sizes, dtypes, strides and windows are errors, not garbage."""
    good = step([(3, 1)], (4, 2, 64), device)
    for query, cache, match in (
        (good.query[..., :48], good.cache, "head dims"),
        (good.query[:, :3], good.cache, "share"),
        (good.query, good.cache[:, :, :, :8].contiguous(), "blocks of 8"),
        (good.query, good.cache[:, ::2], "contiguous"),
        (good.query, good.cache.double(), "cache of"),
        (good.query.transpose(1, 2).contiguous().transpose(1, 2), good.cache, "strides"),
    ):
        with pytest.raises(ValueError, match=match):
            Step(query, cache, *good.plan).out()
    with pytest.raises(ValueError, match="window"):
        good.out(window=0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads", [(32, 8, 128), (16, 8, 64), (8, 1, 256), (32, 32, 80)])
def test_large_steps_are_sdpa(heads, dtype, device):
    """At sizes that fill a GPU, chunks and decodes are torch's attention in float32."""
    spans = [(0, 3000), (4000, 700), (9000, 1), (500, 1), (3, 1)]
    whole = step(spans, heads, device, dtype)
    out = whole.out()
    for b, (cached, new) in enumerate(spans):
        rows, alone = whole.only(b)
        table = torch.from_numpy(alone.block_tables[0, : -(-(cached + new) // 16)]).long().to(device)
        kv = whole.cache[:, table].transpose(1, 2).flatten(2, 3)[:, :, : cached + new].float()
        mask = torch.ones(new, cached + new, dtype=torch.bool, device=device).tril(cached)
        query = alone.query.transpose(0, 1).float()
        expected = F.scaled_dot_product_attention(query[None], *kv[:, None], mask, enable_gqa=True)
        torch.testing.assert_close(
            out[rows].float(), expected[0].transpose(0, 1), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype]
        )


@pytest.mark.gpu
def test_a_captured_graph_serves_other_lengths(device):
    """A CUDA graph captured with one step's lengths replays any that fit its buffer, bit for bit."""
    capacity = BatchCapacity(4, 4, table_blocks=200, prefill_items=0, decode_items=40, merges=4)
    lengths = ([2900, 3, 511, 1024], [0, 1, 2, 3], [700, 3000, 512, 64])
    steps = [step([(n, 1) for n in lens], (8, 2, 128), device, DTYPES[0]) for lens in lengths]
    blocks = max(one.cache.shape[1] for one in steps)
    cache = torch.empty(2, blocks, *steps[0].cache.shape[2:], dtype=DTYPES[0], device=device)
    query = torch.empty_like(steps[0].query)
    buffer = torch.zeros(capacity.ints, dtype=torch.int32, device=device)
    batch = GpuAttentionBatch.view(buffer, capacity)
    paged_attention(query, cache, batch)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = paged_attention(query, cache, batch)
    for one in steps:
        cache[:, : one.cache.shape[1]] = one.cache
        query.copy_(one.query)
        buffer.copy_(torch.from_numpy(pack_attention(np.zeros(4, np.int32), *one.plan, capacity)[0]))
        graph.replay()
        assert torch.equal(out, one.out())
