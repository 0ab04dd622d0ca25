"""Expected answers: a shipped prior, then the model's own, then the tenant's."""

import numpy as np
import pytest

from serving.output_lengths import COLD, EDGES, MAX_TENANTS, TABLE, OutputLengths


def learned(lengths: list[int], tenant: str = "t", limit: int = 10**6) -> OutputLengths:
    known = OutputLengths()
    for length in lengths:
        known.observe("m", tenant, min(length, limit), length <= limit)
    return known


def test_a_cold_model_expects_the_tables_ninetieth_percentile_and_never_more_than_is_allowed() -> None:
    known = learned([5] * (COLD - 1))
    assert known.expected("m", "t", 10_000) == TABLE[-1] <= 512
    assert known.expected("m", "t", 7) == 7
    known.observe("m", "t", 5, True)
    assert known.expected("m", "t", 10_000) < TABLE[-1] / 2


@pytest.mark.parametrize("mean", [20, 150, 900])
def test_the_mean_is_learned_under_any_limit(mean: int) -> None:
    """Geometric lengths: E[min(length, limit)] is mean (1 - exp(-limit / mean))."""
    rng = np.random.default_rng(mean)
    known = learned((rng.geometric(1 / mean, 4000)).tolist())
    for limit in (mean // 4, mean, 4 * mean, 100 * mean):
        exact = mean * (1 - np.exp(-limit / mean))
        assert known.expected("m", "t", limit) == pytest.approx(exact, rel=0.15, abs=2)


def test_answers_that_were_cut_off_are_not_taken_for_short_ones() -> None:
    """Cut at 50 tokens, answers of 400 look like 50; those that end by themselves tell of the rest."""
    rng = np.random.default_rng(1)
    known = OutputLengths()
    for length in rng.geometric(1 / 400, 6000).tolist():
        limit = 50 if rng.random() < 0.5 else 10**6
        known.observe("m", "t", min(length, limit), length <= limit)
    assert known.expected("m", "t", 10**6) == pytest.approx(400, rel=0.2)


def test_a_tenant_has_lengths_of_its_own_and_a_new_one_those_of_the_model() -> None:
    known = OutputLengths()
    for _ in range(300):
        known.observe("m", "terse", 10, True)
        known.observe("m", "verbose", 1000, True)
    terse, verbose = (known.expected("m", tenant, 10_000) for tenant in ("terse", "verbose"))
    assert terse < 60 and verbose > 800
    assert terse < known.expected("m", "new", 10_000) < verbose
    assert known.expected("other", "terse", 10_000) == TABLE[-1]


def test_what_is_long_ago_is_forgotten() -> None:
    """A model that answers shortly from now on is believed after some hundreds of answers."""
    known = learned([2000] * 300 + [20] * 3000)
    assert known.expected("m", "t", 10_000) < 60


def test_the_table_alone_gives_its_own_mean() -> None:
    """The hazards made of the deciles lead back to about the trace's mean of 211 tokens."""
    known = learned([])
    from serving import output_lengths

    expected = output_lengths._expected(output_lengths._TABLE_HAZARDS)
    assert expected[-1] == pytest.approx(200, rel=0.15)
    assert len(expected) == len(EDGES) and known.expected("m", "t", 10**9) == TABLE[-1]


def test_tenants_are_bounded() -> None:
    known = OutputLengths()
    for number in range(MAX_TENANTS + 10):
        known.observe("m", f"t{number}", 10, True)
    assert len(known._tenants) == MAX_TENANTS
