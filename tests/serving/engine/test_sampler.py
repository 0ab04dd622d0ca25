"""Both samplers against a one-row numpy reference, and their laws."""

import itertools

import numpy as np
import pytest
import torch

from serving.engine import native_sampler, sampler
from serving.engine.native_sampler import sample_native
from serving.engine.plan import SamplingBatch
from serving.engine.sampler import sample as sample_torch
from serving.engine.uniform import uniform
from tests.kernels.native_cases import built, needs_library


@pytest.fixture(params=["torch", pytest.param("native", marks=needs_library)])
def sample(request):
    """Tokens int32 [S] of logits [S, V]: each law holds for both."""
    if request.param == "torch":
        return sample_torch
    return lambda logits, batch: torch.from_numpy(sample_native(built(), logits, batch, 2))


def batch(rows, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=0, position=0):
    """A SamplingBatch of `rows` rows; each argument is a value or one a row."""
    return SamplingBatch(
        np.broadcast_to(np.float32(temperature), rows).copy(),
        np.broadcast_to(np.int32(top_k), rows).copy(),
        np.broadcast_to(np.float32(top_p), rows).copy(),
        np.broadcast_to(np.float32(min_p), rows).copy(),
        np.broadcast_to(np.uint64(seed), rows).copy(),
        np.broadcast_to(np.int32(position), rows).copy(),
    )


def softmax(logits):
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def reference_distribution(logits, temperature, top_k, top_p, min_p):
    """The distribution one row is drawn from: the definitions in sampler's docstring, in float64."""
    logits = logits.astype(np.float64)
    if temperature == 0:
        return np.eye(len(logits))[logits.argmax()]
    probabilities = softmax(logits / np.float64(np.float32(temperature)))
    probabilities[probabilities < min_p * probabilities.max()] = 0
    if top_k:
        probabilities[probabilities < np.sort(probabilities)[::-1][min(top_k, len(logits)) - 1]] = 0
    probabilities /= probabilities.sum()
    if top_p < 1:
        ordered = np.sort(probabilities)[::-1]
        last = min(int(np.searchsorted(ordered.cumsum(), top_p)), len(ordered) - 1)
        probabilities[probabilities < ordered[last]] = 0
    return probabilities / probabilities.sum()


CONTROLS = list(
    itertools.product(
        [0.0, 1e-6, 0.3, 1.0, 2.5],  # temperature
        [0, 1, 2, 7, 49, 50, 1000],  # top_k
        [1.0, 0.999, 0.7, 0.13, 0.0],  # top_p
        [0.0, 0.01, 0.37, 1.0],  # min_p
    )
)


@pytest.mark.parametrize("top_ks", [[0], [0, 1, 2, 7], [0, 1, 2, 7, 49, 50, 1000]])
@pytest.mark.parametrize("candidates", [1, 8, 1024])
def test_mixed_rows_invert_the_reference_distribution(sample, monkeypatch, candidates, top_ks):
    """Every mix of controls, all in one batch, gives the reference's inverse CDF at each row's number,
    whether a nucleus is found among the candidates or by sorting."""
    monkeypatch.setattr(sampler, "_NUCLEUS_CANDIDATES", candidates)
    rows = [row for row in CONTROLS if row[1] in top_ks]
    logits = np.random.default_rng(candidates).normal(0, 2, (len(rows), 50)).astype(np.float32)
    logits[::3] = np.round(logits[::3])  # ties
    temperature, top_k, top_p, min_p = zip(*rows, strict=True)
    asked = batch(len(rows), temperature, top_k, top_p, min_p, np.arange(len(rows)), np.arange(len(rows)))
    tokens = sample(torch.from_numpy(logits), asked).numpy()
    numbers = uniform(asked.seed, asked.position)
    for token, row, line, number in zip(tokens, rows, logits, numbers, strict=True):
        cumulative = reference_distribution(line, *row).cumsum()
        below = cumulative[token - 1] if token else 0.0
        assert cumulative[token] > below, f"{row}: a dropped token was drawn"
        # The reference is float64, the sampler float32: borders may move by 1e-5.
        assert row[0] == 0 or below - 1e-5 <= number <= cumulative[token] + 1e-5, row


@pytest.mark.parametrize("number", [0.0, 1 - 2.0**-48])
def test_extreme_numbers_draw_kept_tokens(sample, monkeypatch, number):
    """The least and the largest number draw the first and the last kept token, never a dropped one."""
    for module in (sampler, native_sampler):
        monkeypatch.setattr(module, "uniform", lambda seed, position: np.full(len(seed), number))
    logits = torch.tensor([[0.0, 9.0, 0.0, 9.0, 0.0]]).repeat(40, 1) + torch.arange(40)[:, None] / 7
    assert sample(logits, batch(40, top_k=2)).tolist() == [3 if number else 1] * 40


def test_frequencies_follow_the_probabilities(sample):
    """Over positions of one seed, and over seeds at one position, draws pass a chi-square test."""
    logits = np.log(np.array([0.4, 0.3, 0.15, 0.1, 0.05], dtype=np.float32))
    draws = 20_000
    for seeds, positions in ((7, np.arange(draws)), (np.arange(draws), 3)):
        lines = torch.from_numpy(logits).expand(draws, -1)
        counts = np.bincount(sample(lines, batch(draws, seed=seeds, position=positions)).numpy(), minlength=5)
        expected = draws * softmax(logits.astype(np.float64))
        # 18.47 is the 0.1 % point of chi-square with 4 degrees of freedom; the seeds are fixed.
        assert ((counts - expected) ** 2 / expected).sum() < 18.47


def test_numbers_are_uniform_and_unrelated():
    """The hash fills [0, 1) evenly, and neighbouring seeds or positions do not correlate."""
    seeds, positions = np.meshgrid(np.arange(200, dtype=np.uint64), np.arange(200, dtype=np.int32))
    numbers = uniform(seeds.ravel(), positions.ravel()).reshape(seeds.shape)
    assert numbers.min() >= 0 and numbers.max() < 1
    counts, _ = np.histogram(numbers, bins=20, range=(0, 1))
    assert ((counts - 2000) ** 2 / 2000).sum() < 43.8  # 0.1 % point, 19 degrees of freedom
    for left, right in ((numbers[:-1], numbers[1:]), (numbers[:, :-1], numbers[:, 1:])):
        assert abs(np.corrcoef(left.ravel(), right.ravel())[0, 1]) < 0.02  # 4 sigma


def test_a_draw_does_not_depend_on_its_batch(sample):
    """A row gives the same token alone, reversed, and beside rows that ask for something else."""
    rows = 12
    logits = torch.from_numpy(np.random.default_rng(1).normal(0, 3, (rows, 3000)).astype(np.float32))
    logits[:6] = logits[:6].bfloat16().float()  # ties
    asked = batch(
        rows,
        temperature=[0.0, 0.5, 1.0, 2.0] * 3,
        top_k=[0, 5, 2000] * 4,
        top_p=[1.0, 0.9] * 6,
        min_p=[0, 0, 0.05] * 4,
        seed=np.arange(rows) * 99,
        position=np.arange(rows),
    )
    together = sample(logits, asked)
    backwards = np.arange(rows)[::-1].copy()
    assert sample(logits[backwards], sampler._take(asked, backwards)).flip(0).equal(together)
    alone = [sample(logits[i : i + 1], sampler._take(asked, np.array([i]))) for i in range(rows)]
    assert torch.cat(alone).equal(together)


def test_ties_at_a_cut_are_kept(sample):
    """Three equal logits under top_k 2 are all drawn: a cut is a threshold, not a count."""
    draws = 300
    logits = torch.tensor([5.0, 1.0, 5.0, 5.0]).expand(draws, -1)
    assert set(sample(logits, batch(draws, top_k=2, seed=range(draws))).tolist()) == {0, 2, 3}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("broken", [float("nan"), float("inf"), -float("inf")])
def test_rows_that_are_not_finite_get_minus_one(sample, broken, temperature):
    """One bad value spoils its own row only."""
    logits = torch.zeros(3, 100)
    logits[1, 37] = broken
    tokens = sample(logits, batch(3, temperature=temperature, top_k=[0, 3, 0], top_p=[1, 0.5, 0.5]))
    assert tokens[1] == -1
    assert (tokens[[0, 2]] >= 0).all()
    assert tokens.dtype == torch.int32


def test_no_rows_and_all_greedy(sample):
    """A step that wants no logits draws nothing; greedy rows take the largest."""
    assert sample(torch.empty(0, 10), batch(0)).shape == (0,)
    logits = torch.randn(4, 10)
    assert sample(logits, batch(4, temperature=0.0)).equal(logits.argmax(-1).int())


@needs_library
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0, 30.0])
def test_on_a_whole_vocabulary_both_draw_the_same(temperature):
    """Of 49,152 tokens, with all kinds of cuts; one row in 48 may stand on a border that rounding moves."""
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(48, 49_152, generator=generator) * 3
    logits[::4, :700] += 9  # a wide nucleus
    asked = batch(
        48,
        temperature=temperature,
        top_k=[0, 40, 1, 20_000] * 12,
        top_p=[1.0, 0.9, 0.99] * 16,
        min_p=[0.0] * 24 + [0.05] * 24,
        seed=range(48),
        position=range(48),
    )
    ours = sample_native(built(), logits, asked, 2)
    assert (ours != sample_torch(logits, asked).numpy()).sum() <= 1
