"""The kernels of `kernels.gpu.sampling`, which says how they fit together."""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.gpu.token_weights import load_logits, random_part_of, share_of, units, weigh

_NONE = tl.constexpr(2**31 - 1)  # greater than any token id
_BROKEN = tl.constexpr(-1)  # in place of a chunk's best token: a logit is not finite
LEVELS = tl.constexpr(8)
_LEVEL_BITS = tl.constexpr(5)  # level i: weights of at least 2^(-5 (i + 1)); the last is the unit, so all
_ONE = tl.constexpr(0x3F800000)  # the bits of 1.0, the largest weight


@triton.jit
def largest_kernel(
    logits,  # float32 [S, V]
    allowed,  # int32 [S, V / 32], read where MASKED
    chunk_largest,  # float32 [S, C]
    chunk_best,  # int32 [S, C]
    vocab,
    stride,
    words_stride,
    MASKED: tl.constexpr,
    CHUNK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    values, usable = load_logits(logits + row * stride, allowed + row * words_stride, at, vocab, MASKED)
    is_broken = tl.max((tl.abs(values) < float("inf")).to(tl.int32) ^ 1, axis=0)
    values = tl.where(usable & (tl.abs(values) < float("inf")), values, -float("inf"))
    largest = tl.max(values, axis=0)
    best = tl.min(tl.where(usable & (values == largest), at, _NONE), axis=0)
    place = row * tl.num_programs(1) + tl.program_id(1)
    tl.store(chunk_largest + place, largest)
    tl.store(chunk_best + place, tl.where(is_broken > 0, _BROKEN, best))


@triton.jit
def weigh_kernel(
    logits,
    allowed,
    chunk_largest,
    weights,  # int32 [S, V]: the bits of float32
    counts,  # int32 [S, C, LEVELS]
    sums,  # int64 [S, C, LEVELS]
    temperatures,
    top_ks,
    top_ps,
    min_ps,
    vocab,
    stride,
    words_stride,
    MASKED: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    row, chunk, chunks = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    temperature = tl.load(temperatures + row)
    if temperature > 0:
        at = chunk * CHUNK + tl.arange(0, CHUNK)
        values, usable = load_logits(logits + row * stride, allowed + row * words_stride, at, vocab, MASKED)
        others = tl.arange(0, CHUNKS)
        places = chunk_largest + row * chunks + others
        largest = tl.max(tl.load(places, mask=others < chunks, other=-float("inf")), axis=0)
        bits = weigh(values, usable, largest, temperature, tl.load(min_ps + row))
        tl.store(weights + row * vocab + at, bits, mask=at < vocab)
        whole = units(bits)
        place = (row * chunks + chunk) * LEVELS
        tl.store(counts + place + LEVELS - 1, tl.sum((bits > 0).to(tl.int32), axis=0))
        tl.store(sums + place + LEVELS - 1, tl.sum(whole, axis=0))
        top_k = tl.load(top_ks + row)
        if ((top_k > 0) & (top_k < vocab)) | (tl.load(top_ps + row) < 1):
            for level in tl.static_range(LEVELS - 1):
                reaches = bits >= _level_floor(level)
                tl.store(counts + place + level, tl.sum(reaches.to(tl.int32), axis=0))
                tl.store(sums + place + level, tl.sum(tl.where(reaches, whole, 0), axis=0))


@triton.jit
def _level_floor(level):
    return (127 - _LEVEL_BITS * (level + 1)) << 23


@triton.jit
def _choose_level(counts, sums, row, chunks, is_limited, top_k, top_p, CHUNKS: tl.constexpr):
    """The highest level that holds all that a cut can keep, how many tokens of the row are there, and the
    sum of all of the row's weights."""
    chunk, level = tl.arange(0, CHUNKS)[:, None], tl.arange(0, LEVELS)
    places = (row * chunks + chunk) * LEVELS + level[None, :]
    mask = tl.broadcast_to(chunk < chunks, (CHUNKS, LEVELS))
    count = tl.sum(tl.load(counts + places, mask=mask, other=0), axis=0)
    summed = tl.sum(tl.load(sums + places, mask=mask, other=0), axis=0)
    by_count = count >= tl.minimum(top_k, tl.max(count, axis=0))
    by_sum = summed >= share_of(tl.max(summed, axis=0), top_p)
    # Top-p is taken on what top-k leaves, so with both the count alone decides.
    chosen = tl.min(tl.where(tl.where(is_limited, by_count, by_sum), level, LEVELS - 1), axis=0)
    return chosen, tl.sum(tl.where(level == chosen, count, 0), axis=0), tl.max(summed, axis=0)


@triton.jit
def gather_kernel(
    weights,
    counts,
    sums,
    lists,  # int32 [S, 2, CAPACITY]: weights' bits, token ids
    temperatures,
    top_ks,
    top_ps,
    vocab,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    CAPACITY: tl.constexpr,
):
    row, chunk, chunks = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    top_k, top_p = tl.load(top_ks + row), tl.load(top_ps + row)
    is_limited = (top_k > 0) & (top_k < vocab)
    if (tl.load(temperatures + row) > 0) & (is_limited | (top_p < 1)):
        level, total, _ = _choose_level(counts, sums, row, chunks, is_limited, top_k, top_p, CHUNKS)
        if total <= CAPACITY:
            others = tl.arange(0, CHUNKS)
            places = counts + (row * chunks + others) * LEVELS + level
            before = tl.sum(tl.load(places, mask=others < chunk, other=0), axis=0)
            at = chunk * CHUNK + tl.arange(0, CHUNK)
            bits = tl.load(weights + row * vocab + at, mask=at < vocab, other=0)
            reaches = bits >= _level_floor(level)
            place = lists + row * 2 * CAPACITY + before + tl.cumsum(reaches.to(tl.int32), axis=0) - 1
            tl.store(place, bits, mask=reaches)
            tl.store(place + CAPACITY, at, mask=reaches)


@triton.jit
def _sum_from(entries, length, pivot, BY_COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """Of the weights of at least `pivot`: number or sum, and the least of them; the largest of the others."""
    total, least, below = tl.zeros((), tl.int64), tl.full((), _ONE, tl.int32), tl.zeros((), tl.int32)
    for start in range(0, length, BLOCK):
        at = start + tl.arange(0, BLOCK)
        bits = tl.load(entries + at, mask=at < length, other=0)
        reaches = bits >= pivot
        amount = reaches.to(tl.int64) if BY_COUNT else tl.where(reaches, units(bits), 0)
        total += tl.sum(amount, axis=0)
        least = tl.minimum(least, tl.min(tl.where(reaches, bits, _ONE), axis=0))
        below = tl.maximum(below, tl.max(tl.where(reaches, 0, bits), axis=0))
    return total, least, below


@triton.jit
def _find_cut(entries, length, floor, wanted, BY_COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """The largest cut, not below `floor`, from which on weights reach `wanted` in number or sum."""
    low, high = floor, tl.full((), _ONE + 1, tl.int32)  # from low on they reach it, from high on they do not
    while high - low > 1:
        pivot = low + (high - low) // 2
        total, least, below = _sum_from(entries, length, pivot, BY_COUNT, BLOCK)
        is_reached = total >= wanted
        low = tl.where(is_reached, least, low)
        high = tl.where(is_reached, high, below + 1)
    return low


@triton.jit
def draw_kernel(
    chunk_largest,
    chunk_best,
    weights,
    counts,
    sums,
    lists,
    temperatures,
    top_ks,
    top_ps,
    seeds,
    positions,
    tokens,  # int32 [S]
    vocab,
    chunks,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    CAPACITY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.arange(0, CHUNKS)
    largest = tl.load(chunk_largest + row * chunks + chunk, mask=chunk < chunks, other=-float("inf"))
    best = tl.load(chunk_best + row * chunks + chunk, mask=chunk < chunks, other=_NONE)
    token = tl.min(tl.where(largest == tl.max(largest, axis=0), best, _NONE), axis=0)
    token = tl.where((tl.min(best, axis=0) == _BROKEN) | (token == _NONE), -1, token)
    if (token >= 0) & (tl.load(temperatures + row) > 0):
        top_k, top_p = tl.load(top_ks + row), tl.load(top_ps + row)
        seed, position = tl.load(seeds + row), tl.load(positions + row)
        is_limited = (top_k > 0) & (top_k < vocab)
        entries = weights + row * vocab
        ids = lists + (row * 2 + 1) * CAPACITY
        if is_limited | (top_p < 1):
            level, count, total = _choose_level(counts, sums, row, chunks, is_limited, top_k, top_p, CHUNKS)
            is_listed = count <= CAPACITY
            first = tl.zeros((), tl.int32)
            length = tl.where(is_listed, count, vocab)
            if is_listed:
                entries = lists + row * 2 * CAPACITY
            cut = _level_floor(level)
            if is_limited:
                wanted = tl.minimum(top_k, count).to(tl.int64)
                cut = _find_cut(entries, length, cut, wanted, True, BLOCK)
                total, _, _ = _sum_from(entries, length, cut, False, BLOCK)
            if top_p < 1:
                cut = _find_cut(entries, length, cut, share_of(total, top_p), False, BLOCK)
                total, _, _ = _sum_from(entries, length, cut, False, BLOCK)
            target = random_part_of(total, seed, position)
        else:
            place = sums + (row * chunks + chunk) * LEVELS + LEVELS - 1
            summed = tl.cumsum(tl.load(place, mask=chunk < chunks, other=0), axis=0)
            target = random_part_of(tl.max(summed, axis=0), seed, position)
            its = _first_beyond(summed, target, chunk)
            target -= tl.max(tl.where(chunk < its, summed, 0), axis=0)
            first = its * CHUNK
            length = tl.minimum(vocab - first, CHUNK)
            is_listed = length < 0
            cut = tl.full((), 1, tl.int32)
            entries += first
        entry = _entry_at(entries, length, cut, target, BLOCK)
        token = tl.where(is_listed, tl.load(ids + entry, mask=is_listed, other=0), first + entry)
    tl.store(tokens + row, token)


@triton.jit
def _entry_at(entries, length, cut, target, BLOCK: tl.constexpr):
    """The first entry at which the summed weights of at least `cut` exceed `target`."""
    before, found = tl.zeros((), tl.int64), tl.full((), _NONE, tl.int32)
    for start in range(0, length, BLOCK):
        at = start + tl.arange(0, BLOCK)
        bits = tl.load(entries + at, mask=at < length, other=0)
        amount = tl.where(bits >= cut, units(bits), 0)
        found = tl.minimum(found, _first_beyond(before + tl.cumsum(amount, axis=0), target, at))
        before += tl.sum(amount, axis=0)
    return found


@triton.jit
def _first_beyond(summed, target, at):
    return tl.min(tl.where(summed > target, at, _NONE), axis=0)


@triton.jit
def penalize_kernel(
    logits,
    token_ids,  # int32 [S, P]
    counts,
    repetitions,
    frequencies,
    presences,
    stride,
    listed,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(token_ids + row * listed + at, mask=at < listed, other=-1)
    count = tl.load(counts + row * listed + at, mask=at < listed, other=0)
    place, mask = logits + row * stride + token, token >= 0
    value = tl.load(place, mask=mask, other=0.0)
    repetition = tl.broadcast_to(tl.load(repetitions + row), value.shape)
    value = tl.where(value > 0, tl.div_rn(value, repetition), value * repetition)
    value -= tl.load(frequencies + row) * count.to(tl.float32)
    value -= tl.load(presences + row) * (count > 0).to(tl.float32)
    tl.store(place, value, mask=mask)
