"""From logits to one token a row.

The order is vLLM's: temperature, then min-p, top-k and top-p, each on the distribution that the one
before left (top-p renormalised):

    min-p   keeps tokens with p >= min_p * max p
    top-k   keeps tokens with p >= the k-th largest p
    top-p   keeps the most likely tokens up to the one at which their sum reaches top_p

Each is a threshold on the logits, so tokens tied at a cut are all kept. What is left is drawn by
inverting the cumulative distribution, in token order, at a uniform number that is a hash of (seed,
position): neither the other rows of a batch nor a preemption changes a draw.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from serving.engine.plan import SamplingBatch
from serving.engine.uniform import uniform

# Most nuclei end within so many tokens; a row whose nucleus does not is sorted whole.
_NUCLEUS_CANDIDATES = 1024


def sample(logits: torch.Tensor, sampling: SamplingBatch) -> torch.Tensor:
    """One token a row of float32 logits [S, V], as int32 [S] on the logits' device.

    Rows of temperature 0 take the largest logit. A row with a NaN or an infinity gets -1.
    """
    tokens = logits.argmax(dim=-1)
    drawn = np.flatnonzero(sampling.temperature > 0)
    if len(drawn):
        rows = torch.from_numpy(drawn).to(logits.device)
        tokens[rows] = _draw(logits[rows], _take(sampling, drawn))
    # A sum is finite if and only if its terms are: float32 does not overflow on a model's logits.
    return torch.where(logits.sum(dim=-1).isfinite(), tokens, -1).to(torch.int32)


def _take(sampling: SamplingBatch, rows: NDArray[np.intp]) -> SamplingBatch:
    return SamplingBatch(
        sampling.temperature[rows],
        sampling.top_k[rows],
        sampling.top_p[rows],
        sampling.min_p[rows],
        sampling.seed[rows],
        sampling.position[rows],
    )


def _draw(logits: torch.Tensor, sampling: SamplingBatch) -> torch.Tensor:
    # The largest becomes 0 first, so that a tiny temperature cannot overflow.
    scaled = (logits - logits.amax(dim=-1, keepdim=True)) / _column(sampling.temperature, logits)
    _cut(scaled, sampling)
    cumulative = scaled.softmax(dim=-1).cumsum(dim=-1, dtype=torch.float64)
    target = cumulative[:, -1:] * torch.from_numpy(uniform(sampling.seed, sampling.position))[:, None].to(
        cumulative.device
    )
    # The first token whose cumulative probability exceeds the target: never one of probability 0.
    return torch.searchsorted(cumulative, target, right=True).squeeze(-1)


def _cut(scaled: torch.Tensor, sampling: SamplingBatch) -> None:
    """Set what min-p, top-k and top-p drop to -inf; rows' largest entries are 0."""
    vocab = scaled.shape[-1]
    if (sampling.min_p > 0).any():
        # log(0) = -inf keeps everything.
        _drop_below(scaled, _column(sampling.min_p, scaled).log())
    limited = (sampling.top_k > 0) & (sampling.top_k < vocab)
    nucleus = sampling.top_p < 1
    if not limited.any() and not nucleus.any():
        return
    width = max(int(sampling.top_k[limited].max(initial=0)), _NUCLEUS_CANDIDATES if nucleus.any() else 0)
    largest = scaled.topk(min(width, vocab), dim=-1).values  # [S, width], descending
    if limited.any():
        last = torch.from_numpy(np.where(limited, sampling.top_k, 1).astype(np.int64) - 1)
        kth = largest.gather(1, last.to(scaled.device)[:, None])
        unlimited = torch.from_numpy(~limited).to(scaled.device)[:, None]
        _drop_below(scaled, kth.masked_fill(unlimited, float("-inf")))
    if nucleus.any():
        _drop_below(scaled, _nucleus_threshold(scaled, largest, _column(sampling.top_p, scaled)))


def _nucleus_threshold(scaled: torch.Tensor, largest: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """The smallest logit [S, 1] in each row's nucleus; -inf where top_p is 1."""
    log_total = scaled.logsumexp(dim=-1, keepdim=True)
    threshold, covered = _first_reaching(largest, log_total, top_p)
    uncovered = ~covered & (top_p < 1)
    if largest.shape[-1] < scaled.shape[-1] and uncovered.any():
        rows = uncovered.squeeze(-1).nonzero().squeeze(-1)
        ordered = scaled[rows].sort(dim=-1, descending=True).values
        threshold[rows], covered[rows] = _first_reaching(ordered, log_total[rows], top_p[rows])
    # Not covered by all of its tokens: only rounding keeps the sum from reaching top_p.
    return threshold.masked_fill(~covered | (top_p >= 1), float("-inf"))


def _first_reaching(
    ordered: torch.Tensor, log_total: torch.Tensor, top_p: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(entry of descending `ordered` at which summed probability reaches top_p, whether it does), [S, 1]."""
    summed = (ordered - log_total).exp().cumsum(dim=-1, dtype=torch.float64)
    at = torch.searchsorted(summed, top_p.double())
    return ordered.gather(1, at.clamp(max=ordered.shape[-1] - 1)), at < ordered.shape[-1]


def _drop_below(values: torch.Tensor, threshold: torch.Tensor) -> None:
    values.masked_fill_(values < threshold, float("-inf"))


def _column(values: NDArray[np.float32], like: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(values)[:, None].to(like.device)
