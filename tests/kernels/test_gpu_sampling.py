"""Sampling: the kernels and the torch path give one answer, and it is the definitions'."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import sampling
from kernels.dispatch import forced
from kernels.gpu import sampling as gpu
from kernels.sampling import Penalties, SamplingControls, distribution_reference, random_bits, sample
from serving.engine.plan import SamplingBatch
from serving.engine.sampler import sample as sample_engine
from serving.engine.uniform import uniform

# The interpreter takes half a second for a row, so without a GPU some of the rows stand for all.
EVERY = 1 if torch.cuda.is_available() else 37
SEEDS = [0, 1, 12345, 2**63 - 1, 2**63, 2**64 - 1]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """A few dozen tokens make several chunks, blocks of a list, and lists that overflow."""
    monkeypatch.setattr(gpu, "CONFIG", gpu.Config(chunk=32, capacity=24, block=16))


def controls(rows, device="cpu", temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=0, position=0, **more):
    """SamplingControls of `rows` rows; each argument is a value or one a row."""

    def column(values, dtype):
        return torch.from_numpy(np.broadcast_to(np.asarray(values, dtype), rows).copy()).to(device)

    return SamplingControls(
        column(temperature, np.float32),
        column(top_k, np.int32),
        column(top_p, np.float32),
        column(min_p, np.float32),
        column(np.asarray(seed, np.uint64).view(np.int64), np.int64),
        column(position, np.int32),
        **more,
    )


def both(logits, asked, penalties=None, allowed=None):
    """The kernels' tokens, which are the torch path's."""
    with forced("torch"):
        expected = sample(logits.clone(), asked, penalties, allowed)
    with forced("triton"):
        tokens = sample(logits.clone(), asked, penalties, allowed)
    assert tokens.tolist() == expected.tolist()
    return tokens


CONTROLS = list(
    itertools.product(
        [0.0, 1e-6, 0.3, 1.0, 2.5],  # temperature
        [0, 1, 2, 7, 40, 53, 1000],  # top_k
        [1.0, 0.999, 0.7, 0.13, 0.0],  # top_p
        [0.0, 0.01, 0.37, 1.0],  # min_p
    )
)[::EVERY]


def mixed_rows(vocab, device):
    """A row for each of CONTROLS: a third of them full of ties, a third flat."""
    logits = torch.randn(len(CONTROLS), vocab, generator=torch.Generator().manual_seed(0)) * 2
    logits[::3] = logits[::3].round()
    logits[1::3] *= 0.05
    temperature, top_k, top_p, min_p = zip(*CONTROLS, strict=True)
    numbers = np.arange(len(CONTROLS))
    return logits.to(device), controls(
        len(CONTROLS), device, temperature, top_k, top_p, min_p, seed=numbers * 7919, position=numbers
    )


@pytest.mark.parametrize("vocab", [1, 53])
def test_any_mix_of_controls_inverts_the_distribution(vocab, device):
    """Kernel, torch path, and the inverse of the float64 distribution at each row's number agree."""
    logits, asked = mixed_rows(vocab, device)
    tokens = both(logits, asked)
    off = 0
    for row, (token, line, control) in enumerate(zip(tokens.tolist(), logits.cpu(), CONTROLS, strict=True)):
        p = distribution_reference(line, *control)
        number = random_bits(row * 7919, row) / 2.0**48
        assert p[token] > 0 or control[2] < 1, f"{control}: a dropped token was drawn"
        expected = min(int((p.cumsum(0) > number).byte().argmax()), vocab - 1)
        off += token != expected
    # float64 and float32 may see a border on different sides, where a cut falls between two tokens.
    assert off <= len(CONTROLS) // 200


@settings(max_examples=20, deadline=None)
@given(
    steps=st.lists(st.integers(-12, 12), min_size=1, max_size=70),
    scale=st.sampled_from([0.0, 0.01, 0.5, 1.0, 6.0]),
    temperature=st.sampled_from([0.0, 0.01, 0.7, 1.0, 50.0]),
    top_k=st.integers(0, 75),
    top_p=st.floats(0, 1, width=32),
    min_p=st.sampled_from([0.0, 1e-9, 0.1, 1.0]),
    seed=st.sampled_from(SEEDS),
    position=st.integers(0, 2**31 - 1),
)
def test_ties_everywhere_change_nothing(steps, scale, temperature, top_k, top_p, min_p, seed, position):
    """Rows made of a few values, or of one: cuts fall on ties, and on none of them the paths part."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    logits = (torch.tensor([steps], dtype=torch.float32) * scale).to(device)
    both(logits, controls(1, device, temperature, top_k, top_p, min_p, seed, position))


def test_ties_at_a_cut_are_kept(device):
    """Three equal logits under top_k 2, or top_p 0.5, are all drawn: a cut is a threshold, not a count."""
    logits = torch.full((90, 40), -1.0)
    logits[:, [3, 17, 39]] = 5.0
    for cut in ({"top_k": 2}, {"top_p": 0.5}):
        assert set(sample(logits, controls(90, seed=range(90), **cut)).tolist()) == {3, 17, 39}
        both(logits[:4].to(device), controls(4, device, seed=range(4), **cut))


@pytest.mark.parametrize("top_p,kept", [(0.80, 1), (0.85, 5), (0.99, 16)])
def test_a_cut_below_what_stands_out_is_found(top_p, kept, device):
    """One token of weight 1 has 0.8101 of its row, fifteen of weights about 1/64 the rest: a cut among
    those is found, though the first alone has nearly all that is asked for; numbers near 1 draw the last."""
    weights = torch.cat((torch.ones(1), torch.linspace(1.01, 0.99, 15) / 64))
    largest = sorted(range(1000), key=lambda position: random_bits(0, position))[-3:]
    tokens = both(weights.log().repeat(3, 1).to(device), controls(3, device, top_p=top_p, position=largest))
    assert tokens.tolist() == [kept - 1] * 3


def test_cuts_that_fall_exactly_between_tokens(device):
    """Of weights 1, 1/2, 1/4, 1/4 a top_p of 1/2 is reached by the first, of 3/4 by the first two."""
    log2e = np.float32(sampling.LOG2E)  # as a temperature it makes powers of two
    logits = torch.tensor([[0.0, -1.0, -2.0, -2.0]], device=device)
    late = next(
        seed for seed in range(100) if random_bits(seed, 0) > 0.95 * 2**48
    )  # draws the last that is kept
    for top_p, last in ((0.5, 0), (0.50001, 1), (0.75, 1), (0.75001, 3)):
        assert both(logits, controls(1, device, log2e, top_p=top_p, seed=late)).item() == last


@pytest.mark.parametrize("vocab", [2047, 2048, 2049])
def test_equal_probabilities_are_drawn_by_their_number(monkeypatch, vocab, device):
    """Of V equal tokens the one at floor(u V) is drawn: uncut, and where a list just holds them or not."""
    monkeypatch.setattr(gpu, "CONFIG", gpu.Config(chunk=1024, capacity=2048, block=1024))
    logits = torch.full((4, vocab), 2.5, device=device)
    wanted = [random_bits(seed, 5) * vocab >> 48 for seed in range(4)]
    cuts = {"top_k": [0, 9, 0, 3], "top_p": [1, 1, 0.3, 0.9], "min_p": [0, 0, 0, 1]}
    assert both(logits, controls(4, device, seed=range(4), position=5, **cuts)).tolist() == wanted


@pytest.mark.parametrize("seed", SEEDS)
def test_numbers_are_the_engines(seed):
    """Seeds of all 64 bits and positions to the last give serving.engine.uniform's numbers."""
    positions = np.array([0, 1, 77, 2**31 - 1], dtype=np.int32)
    theirs = uniform(np.full(4, seed, dtype=np.uint64), positions)
    assert [random_bits(seed, int(position)) / 2.0**48 for position in positions] == theirs.tolist()


def test_tokens_are_the_engines(monkeypatch, device):
    """On 3,000 tokens the engine's sampler, in float arithmetic, draws the same."""
    monkeypatch.setattr(gpu, "CONFIG", gpu.Config(chunk=2048, capacity=512, block=1024))
    rows, numbers = 8, np.arange(8)
    logits = torch.randn(rows, 3000, generator=torch.Generator().manual_seed(4)) * 3
    logits[4:] = logits[4:].bfloat16().float()  # ties
    asked = SamplingBatch(
        np.full(rows, 0.8, np.float32),
        np.resize([0, 40, 1, 2000], rows).astype(np.int32),
        np.resize([1.0, 0.9, 0.99], rows).astype(np.float32),
        np.resize([0.0, 0.0, 0.0, 0.0, 0.02], rows).astype(np.float32),
        numbers.astype(np.uint64),
        numbers.astype(np.int32),
    )
    theirs = sample_engine(logits, asked)
    ours = both(
        logits.to(device),
        controls(rows, device, asked.temperature, asked.top_k, asked.top_p, asked.min_p, asked.seed, numbers),
    )
    assert ours.cpu().equal(theirs)


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_that_are_not_finite_get_minus_one(broken, temperature, device):
    """One bad value spoils its own row only, wherever it is and whatever is asked."""
    logits = torch.randn(4, 50, device=device)
    logits[1, 49] = logits[3, 0] = broken
    asked = controls(4, device, temperature, top_k=[0, 3, 0, 0], top_p=[1, 0.5, 1, 1])
    tokens = both(logits, asked)
    assert (tokens < 0).tolist() == [False, True, False, True] and (tokens[1::2] == -1).all()


def test_greedy_rows_take_the_first_of_the_largest(device):
    """Also in a later chunk, beside rows that draw, and when the host knows that all are greedy."""
    logits = torch.randn(6, 53).round()
    logits[3, [20, 21, 50]] = 9.0
    logits[4] = 0.0
    logits = logits.to(device)
    expected = logits.argmax(dim=1).tolist()
    assert expected[3:5] == [20, 0]
    mixed = both(logits, controls(6, device, [0, 1, 0, 0, 0, 1]))
    assert [mixed[i].item() for i in (0, 2, 3, 4)] == [expected[i] for i in (0, 2, 3, 4)]
    assert both(logits, controls(6, device, 0.0, is_greedy=True)).tolist() == expected


def test_masked_tokens_are_never_drawn(device):
    """Not the most likely one, not at temperature 0; a row with none allowed gets -1, NaN is still found."""
    rows, vocab = 12, 53
    permitted = torch.rand(rows, vocab, generator=torch.Generator().manual_seed(1)) < 0.2
    permitted[7] = False
    words = torch.zeros(rows, 2, dtype=torch.int64)
    for token in range(vocab):
        words[:, token // 32] |= permitted[:, token].long() << (token % 32)
    allowed = words.to(torch.int32).to(device)  # the sign bit is token 31's
    logits = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(2)) * 3
    logits[~permitted] += 30
    logits[11, (~permitted[11]).nonzero()[0]] = float("nan")
    asked = controls(
        rows, device, [0.0, 1.0, 1.0] * 4, top_k=[0, 4] * 6, top_p=[1, 1, 0.9] * 4, seed=range(rows)
    )
    tokens = both(logits.to(device), asked, allowed=allowed).tolist()
    assert tokens[7] == tokens[11] == -1
    assert all(permitted[row, token] for row, token in enumerate(tokens) if row not in (7, 11))


def test_penalties_are_their_formula(device):
    """Repetition divides or multiplies by sign; tokens of the prompt have it alone."""
    logits = torch.tensor([[2.0, -2.0, 2.0, -2.0, 0.0, 1.0]] * 2, device=device)
    penalties = Penalties(
        token_ids=torch.tensor([[0, 1, 2, 3], [5, -1, -1, -1]], dtype=torch.int32, device=device),
        counts=torch.tensor([[0, 0, 3, 1], [2, 9, 9, 9]], dtype=torch.int32, device=device),
        repetition=torch.tensor([2.0, 1.0], device=device),
        frequency=torch.tensor([0.5, 0.25], device=device),
        presence=torch.tensor([0.125, 1.0], device=device),
    )
    expected = [[1.0, -4.0, -0.625, -4.625, 0.0, 1.0], [2.0, -2.0, 2.0, -2.0, 0.0, -0.5]]
    for apply in (sampling.penalize, gpu.penalize):
        penalized = logits.clone()
        apply(penalized, penalties)
        assert penalized.tolist() == expected


def test_penalties_come_before_all_else(device):
    """The kernels' tokens follow from penalised logits, with random penalties too."""
    rows, vocab = 6, 53
    generator = torch.Generator().manual_seed(3)
    logits = (torch.randn(rows, vocab, generator=generator) * 2).to(device)
    ids = torch.stack([torch.randperm(vocab, generator=generator)[:11] for _ in range(rows)]).to(torch.int32)
    ids[::4, 6:] = -1
    uniforms = (torch.rand(rows, generator=generator).to(device) for _ in range(3))
    counts = torch.randint(0, 5, ids.shape, generator=generator, dtype=torch.int32)
    penalties = Penalties(ids.to(device), counts.to(device), 1 + next(uniforms), *uniforms)
    asked = controls(rows, device, [0.0, 0.9] * 3, top_k=[0, 0, 5] * 2, seed=range(rows))
    tokens = both(logits, asked, penalties)
    sampling.penalize(logits, penalties)
    assert both(logits, asked).tolist() == tokens.tolist()


def test_a_draw_depends_on_neither_batch_nor_partition(monkeypatch, device):
    """A row alone, in a padded buffer, or cut into other chunks and lists gives the same token."""
    logits = torch.randn(4, 53, generator=torch.Generator().manual_seed(5), device="cpu").to(device)
    cuts = {"top_k": [0, 9, 0, 30], "top_p": [1, 1, 0.8, 0.8], "seed": [3, 4, 5, 6]}
    wide = torch.full((4, 64), float("nan"), device=device)
    wide[:, :53] = logits
    together = both(wide[:, :53], controls(4, device, **cuts))
    for config in (gpu.Config(), gpu.Config(chunk=64, capacity=4, block=64)):
        monkeypatch.setattr(gpu, "CONFIG", config)
        with forced("triton"):
            assert sample(logits, controls(4, device, **cuts)).equal(together)
            for row in range(4):
                asked = controls(1, device, **{name: values[row] for name, values in cuts.items()})
                assert sample(logits[row : row + 1], asked).equal(together[row : row + 1])


def test_no_launch_fuses_multiply_and_add(monkeypatch, device):
    """A GPU would round once where the reference rounds twice; the interpreter cannot show it."""
    fused = []

    class Recorded:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            def launch(*arguments, **options):
                fused.append(options["enable_fp_fusion"])
                self.kernel[grid](*arguments, **options)

            return launch

    for name in ("penalize", "largest", "weigh", "gather", "draw"):
        monkeypatch.setattr(gpu, f"{name}_kernel", Recorded(getattr(gpu, f"{name}_kernel")))
    ones = torch.ones(1, device=device)
    entries = torch.ones(1, 1, dtype=torch.int32, device=device)
    both(
        torch.zeros(1, 40, device=device), controls(1, device), Penalties(entries, entries, ones, ones, ones)
    )
    assert fused == [False] * 5


@pytest.mark.gpu
@pytest.mark.parametrize("vocab", [32_000, 151_936, 262_144])
def test_on_whole_vocabularies_the_paths_agree(monkeypatch, vocab, device):
    """Peaked, common and flat rows, in float32 and with bfloat16's ties, under all kinds of cuts."""
    monkeypatch.setattr(gpu, "CONFIG", gpu.Config())
    rows = 48
    logits = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(6)) * 3
    logits[::4] *= 0.01
    logits[1::4, :700] += 9
    logits[::2] = logits[::2].bfloat16().float()
    cuts = {"top_k": [0, 50, 0, 20_000] * 12, "top_p": [1, 0.95, 0.9] * 16, "min_p": [0] * 24 + [0.05] * 24}
    both(logits.to(device), controls(rows, device, seed=range(rows), position=range(rows), **cuts))


def test_frequencies_follow_the_probabilities():
    """Draws over positions pass a chi-square test."""
    p = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05])
    draws = 20_000
    tokens = sample(p.log().expand(draws, -1).contiguous(), controls(draws, seed=7, position=range(draws)))
    counts = torch.bincount(tokens, minlength=5)
    # 18.47 is the 0.1 % point of chi-square with 4 degrees of freedom; the seed is fixed.
    assert ((counts - draws * p) ** 2 / (draws * p)).sum() < 18.47


def test_no_rows_and_refusals(device):
    """No rows draw nothing; what the kernels cannot take raises instead of reading other memory."""
    assert both(torch.empty(0, 10, device=device), controls(0, device)).shape == (0,)
    logits = torch.zeros(2, 40, device=device)
    with forced("triton"):
        for refused in (
            lambda: sample(logits.half(), controls(2, device)),
            lambda: sample(logits.T, controls(40, device)),
            lambda: sample(logits, controls(3, device)),
            lambda: sample(
                logits, controls(2, device), allowed=torch.zeros(2, 1, dtype=torch.int32, device=device)
            ),
        ):
            with pytest.raises(ValueError):
                refused()
