"""Sampling without a sort, in four launches. Formulas and arithmetic in `kernels.sampling`.

A row is cut into chunks, a program each, so that one row alone still fills a GPU: with a row a program, all
other multiprocessors would be idle at the small batches where a step is shortest.

    largest   chunk → its largest allowed logit, which one it is, whether all are finite
    weigh     chunk → its weights; for each of LEVELS thresholds, how many reach it and their sum
    gather    row → the highest level that holds all that a cut can keep; chunk → its tokens there, in order,
              to the row's list
    draw      row → the two cuts, by halving the range of float32 bit patterns over the list, each step
              jumping to a weight that occurs; then the token

A row without top-k and top-p needs no list: the chunks' sums tell which chunk the token is in. A row whose
list would be longer than `capacity`, a very flat one, is gone through whole. Sums are of integers and
nothing is atomic, so that neither timing nor the batch changes a result. Launches depend on shapes and on
`is_greedy` (which leaves out the middle two) alone, so they can be captured.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton

from kernels.gpu.sampling_kernels import (
    LEVELS,
    draw_kernel,
    gather_kernel,
    largest_kernel,
    penalize_kernel,
    weigh_kernel,
)
from kernels.gpu.variants import Variant
from kernels.sampling import Penalties, SamplingControls

_MAX_VOCAB = 1 << 21  # sums of so many weights stay below 2^62 units
_CONTROLS = {
    **dict.fromkeys(("temperature", "top_p", "min_p"), torch.float32),
    **dict.fromkeys(("top_k", "position"), torch.int32),
    "seed": torch.int64,
}
_PENALTIES = ("repetition", "frequency", "presence")
_TYPES = {
    **dict.fromkeys(("logits", "chunk_largest", "temperatures", "top_ps", "min_ps"), "*fp32"),
    **dict.fromkeys(("repetitions", "frequencies", "presences"), "*fp32"),
    **dict.fromkeys(("allowed", "chunk_best", "weights", "counts", "lists", "top_ks"), "*i32"),
    **dict.fromkeys(("positions", "tokens", "token_ids"), "*i32"),
    **dict.fromkeys(("sums", "seeds"), "*i64"),
    **dict.fromkeys(("vocab", "stride", "words_stride", "chunks", "listed"), "i32"),
}


@dataclass(frozen=True)
class Config:
    """Tokens a chunk, entries of a row's list, and of them at a time; warps for a chunk and for a row."""

    chunk: int = 2048
    capacity: int = 16_384
    block: int = 512
    chunk_warps: int = 8
    row_warps: int = 4


CONFIG = Config()


def sample(
    logits: torch.Tensor,
    controls: SamplingControls,
    penalties: Penalties | None = None,
    allowed: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `kernels.sampling.sample`. Raises ValueError at other shapes, strides or dtypes than theirs."""
    _check(logits, controls, penalties, allowed)
    rows, vocab = logits.shape
    tokens = torch.empty(rows, dtype=torch.int32, device=logits.device)
    if not rows:
        return tokens
    if penalties is not None:
        penalize(logits, penalties)
    c, chunks = CONFIG, triton.cdiv(vocab, CONFIG.chunk)
    sizes = {"CHUNK": c.chunk, "CHUNKS": triton.next_power_of_2(chunks)}
    by_chunk = {"num_warps": c.chunk_warps, "enable_fp_fusion": False}
    levels = (rows, chunks, LEVELS.value)
    largest = torch.empty(levels[:2], dtype=torch.float32, device=logits.device)
    best = torch.empty_like(largest, dtype=torch.int32)
    counts = torch.empty(levels, dtype=torch.int32, device=logits.device)
    sums = torch.empty(levels, dtype=torch.int64, device=logits.device)
    weights = torch.empty((0 if controls.is_greedy else rows, vocab), dtype=torch.int32, device=logits.device)
    lists = torch.empty((len(weights), 2, c.capacity), dtype=torch.int32, device=logits.device)
    masks = logits if allowed is None else allowed
    shape = (vocab, logits.stride(0), masks.stride(0))
    cuts = (controls.temperature, controls.top_k, controls.top_p)

    grid, masked = (rows, chunks), allowed is not None
    largest_kernel[grid](logits, masks, largest, best, *shape, MASKED=masked, CHUNK=c.chunk, **by_chunk)
    if not controls.is_greedy:
        weigh_kernel[grid](
            logits, masks, largest, weights, counts, sums, *cuts, controls.min_p, *shape,
            MASKED=masked, **sizes, **by_chunk,
        )  # fmt: skip
        gather_kernel[grid](
            weights, counts, sums, lists, *cuts, vocab, **sizes, CAPACITY=c.capacity, **by_chunk
        )
    draw_kernel[(rows,)](
        largest, best, weights, counts, sums, lists, *cuts, controls.seed, controls.position, tokens,
        vocab, chunks, **sizes, CAPACITY=c.capacity, BLOCK=c.block,
        num_warps=c.row_warps, enable_fp_fusion=False,
    )  # fmt: skip
    return tokens


def penalize(logits: torch.Tensor, penalties: Penalties) -> None:
    """As `kernels.sampling.penalize`."""
    listed = penalties.token_ids.shape[1]
    if listed:
        penalize_kernel[(len(logits), triton.cdiv(listed, CONFIG.block))](
            logits, penalties.token_ids, penalties.counts, penalties.repetition, penalties.frequency,
            penalties.presence, logits.stride(0), listed,
            BLOCK=CONFIG.block, num_warps=CONFIG.row_warps, enable_fp_fusion=False,
        )  # fmt: skip


def _check(
    logits: torch.Tensor,
    controls: SamplingControls,
    penalties: Penalties | None,
    allowed: torch.Tensor | None,
) -> None:
    rows, vocab = logits.shape
    if logits.dtype is not torch.float32 or logits.stride(1) != 1 or not 0 < vocab <= _MAX_VOCAB:
        raise ValueError(f"logits are float32 [S, V], rows adjacent; not {logits.dtype} {logits.stride()}")
    if allowed is not None:
        wanted = (rows, triton.cdiv(vocab, 32))
        if allowed.dtype is not torch.int32 or allowed.shape != wanted or allowed.stride(1) != 1:
            raise ValueError(f"a bitmask is int32 {wanted}, not {allowed.dtype} {tuple(allowed.shape)}")
    columns = [(getattr(controls, name), kind) for name, kind in _CONTROLS.items()]
    if penalties is not None:
        columns += [(getattr(penalties, name), torch.float32) for name in _PENALTIES]
        for entries in (penalties.token_ids, penalties.counts):
            if entries.dtype is not torch.int32 or entries.ndim != 2 or not entries.is_contiguous():
                raise ValueError(f"lists of tokens are int32 [S, P], not {entries.dtype} {entries.stride()}")
        if penalties.token_ids.shape != penalties.counts.shape or len(penalties.counts) != rows:
            raise ValueError(f"{tuple(penalties.counts.shape)} counts of {rows} rows")
    for column, kind in columns:
        if column.shape != (rows,) or column.dtype is not kind or not column.is_contiguous():
            raise ValueError(f"a control is {kind} [{rows}], not {column.dtype} {tuple(column.shape)}")


def variants() -> Iterator[Variant]:
    """Vocabularies of one chunk, 32k, 152k and 256k tokens, with and without a bitmask."""
    c = CONFIG
    yield _variant("penalize", penalize_kernel, {"BLOCK": c.block}, c.row_warps)
    for masked in (False, True):
        name = f"largest{' of allowed' if masked else ''}"
        yield _variant(name, largest_kernel, {"MASKED": masked, "CHUNK": c.chunk}, c.chunk_warps)
    for chunks in (1, 16, 128):
        sizes: dict[str, object] = {"CHUNK": c.chunk, "CHUNKS": chunks}
        for masked in (False, True):
            name = f"weigh{' allowed' if masked else ''} {chunks}"
            yield _variant(name, weigh_kernel, {"MASKED": masked, **sizes}, c.chunk_warps)
        listed = {**sizes, "CAPACITY": c.capacity}
        yield _variant(f"gather {chunks}", gather_kernel, listed, c.chunk_warps)
        yield _variant(f"draw {chunks}", draw_kernel, {**listed, "BLOCK": c.block}, c.row_warps)


def _variant(name: str, kernel: triton.JITFunction, constexprs: dict[str, object], num_warps: int) -> Variant:
    signature = {name: _TYPES[name] for name in kernel.arg_names if name not in constexprs}
    return Variant(
        name=f"sampling {name}",
        kernel=kernel,
        signature=signature,
        constexprs=constexprs,
        num_warps=num_warps,
        num_stages=3,
        aligned=tuple(
            name for name, kind in signature.items() if kind[0] == "*" or name in ("vocab", "stride")
        ),
    )
