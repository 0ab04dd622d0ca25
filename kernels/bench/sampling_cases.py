"""Sampling at a large vocabulary; every path gives the same token, so the error is 0 or it is wrong."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from kernels.bench.case import Case, Peer, Place, nbytes
from kernels.dispatch import forced
from kernels.sampling import SamplingControls, sample

_VOCAB = 151_936
_ROWS = (1, 64, 256)
# temperature, top-k, top-p, min-p
_ASKED = {
    "greedy": (0.0, 0, 1.0, 0.0),
    "T": (0.8, 0, 1.0, 0.0),
    "T top-k top-p": (0.8, 50, 0.9, 0.0),
    "T min-p": (0.8, 0, 1.0, 0.05),
}


def cases(place: Place) -> Iterator[Case]:
    """Every kind of cut."""
    vocab, sizes = (700, (3,)) if place.tiny else (_VOCAB, _ROWS)
    for rows in sizes:
        logits = place.randn(rows, vocab).float() * 4
        for name, asked in _ASKED.items():
            yield _case(f"{name} S={rows} V={vocab}", logits, *asked)


def _case(
    shape: str, logits: torch.Tensor, temperature: float, top_k: int, top_p: float, min_p: float
) -> Case:
    rows = len(logits)

    def full(value: float, dtype: torch.dtype) -> torch.Tensor:
        return torch.full((rows,), value, dtype=dtype, device=logits.device)

    controls = SamplingControls(
        temperature=full(temperature, torch.float32),
        top_k=full(top_k, torch.int32),
        top_p=full(top_p, torch.float32),
        min_p=full(min_p, torch.float32),
        seed=torch.arange(rows, device=logits.device),
        position=full(7, torch.int32),
        is_greedy=temperature == 0,
    )

    def expected() -> torch.Tensor:
        with forced("torch"):
            return sample(logits, controls).double()

    return Case(
        shape=shape,
        run=lambda: sample(logits, controls),
        expected=expected,
        moved_bytes=nbytes(logits),
        flops=logits.numel(),
        bound="memory",
        tolerance=0.0,
        peers=(Peer("torch, sorted", lambda: _sorted(logits, temperature, top_k, top_p, min_p)),),
    )


def _sorted(logits: torch.Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> torch.Tensor:
    """The usual way: a sort where there is a cut by rank or sum, and an exponential race."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    p = (logits / temperature).softmax(dim=-1)
    if min_p > 0:
        p = p.masked_fill(p < min_p * p.amax(dim=-1, keepdim=True), 0)
    if top_k == 0 and top_p == 1:
        return (p / torch.empty_like(p).exponential_()).argmax(dim=-1)
    ordered, tokens = p.sort(dim=-1, descending=True)
    ordered[:, top_k or len(p[0]) :] = 0
    ordered = ordered.masked_fill(ordered.cumsum(dim=-1) - ordered > top_p * ordered.sum(-1, True), 0)
    at = (ordered / torch.empty_like(p).exponential_()).argmax(dim=-1, keepdim=True)
    return tokens.gather(1, at).squeeze(1)
