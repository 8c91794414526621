"""Intervals cover as often as they say, and families of tests find nothing where there is nothing."""

import math

import numpy as np
import pytest
from scipy import stats

from xformers_lab.report import intervals
from xformers_lab.report.contests import Contest, Scores
from xformers_lab.report.intervals import Difference


def scores(values: np.ndarray, sampled: float = 0.0) -> list[Scores]:
    """A series for each row of an array of variants x seeds."""
    return [Scores(f"v{at}", dict(enumerate(map(float, mine))), sampled) for at, mine in enumerate(values)]


# ---- worked values ----------------------------------------------------------------------------------------------


def test_mean_and_interval_against_worked_values():
    # Mean 3, deviation sqrt(2.5), 4 degrees of freedom: 2.776445 * sqrt(2.5 / 5).
    estimated = intervals.estimate([1.0, 2.0, 3.0, 4.0, 5.0])
    assert estimated == (3.0, pytest.approx(1.963243, abs=1e-6), 5)
    assert intervals.estimate([0.7]) == (0.7, None, 1)
    assert intervals.estimate([0.7], 0.1) == (0.7, 0.1, 1)


def test_quantiles_are_those_of_tables():
    printed = {1: 12.7062, 2: 4.30265, 5: 2.57058, 30: 2.04227, math.inf: 1.95996}
    assert {n: intervals.quantile(n) for n in printed} == pytest.approx(printed, rel=1e-5)
    assert intervals.quantile(2, 0.01) == pytest.approx(9.92484, rel=1e-5)


def test_differences_are_paired_by_seed():
    first, second = {0: 0.5, 1: 0.7, 2: 0.9}, {2: 0.8, 1: 0.61, 0: 0.4}
    # The seeds spread far more than the variants differ, and still the difference (0.10, 0.09, 0.10) is plain.
    assert intervals.differ(first, second) is True
    assert intervals.differ(first, {0: 0.6, 1: 0.6, 2: 0.9}) is False
    assert intervals.differ(first, {0: 0.1, 7: 0.2}) is None


def test_p_values_are_those_of_a_paired_t_test():
    rng = np.random.default_rng(1)
    first, second = rng.normal(0.3, 1, 6), rng.normal(0, 1, 6)
    paired = intervals.difference(dict(enumerate(first)), dict(enumerate(second)))
    assert paired is not None and paired.p == pytest.approx(stats.ttest_rel(first, second).pvalue, rel=1e-9)
    assert Difference(0.0, 0.0, 3).p == 1 and Difference(0.1, 0.0, 3).p == 0
    assert Difference(1.96, 0.0, 1, 1.959964).p == pytest.approx(0.05, rel=1e-3)


@pytest.mark.parametrize(
    "difference", [Difference(0.5, 0.2, 4, 0.3), Difference(0.5, 0.1, 3), Difference(1, 0, 1, 0.7)]
)
def test_the_interval_of_the_level_p_ends_at_zero(difference):
    assert difference.half(difference.p) == pytest.approx(abs(difference.mean), rel=1e-6)


def test_holm_against_a_worked_family():
    """p = 0.01, 0.04, 0.03, 0.005 -> 0.03, 0.06, 0.06, 0.02: the example of R's p.adjust."""
    error = 1 / intervals.quantile(math.inf)
    family = {p: Difference(-float(stats.norm.ppf(p / 2)), 0.0, 1, 1 / error) for p in (0.01, 0.04, 0.03, 0.005)}
    decided = intervals.holm(family)
    assert list(decided) == list(family)
    assert [each.adjusted for each in decided.values()] == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert [each.holds for each in decided.values()] == [True, False, False, True]


def test_a_corrected_interval_holds_zero_where_the_difference_does_not_hold():
    rng = np.random.default_rng(2)
    for effects in rng.normal(0, 2, (50, 6)):
        values = effects[:, None] + rng.normal(0, 1, (6, 4))
        decided = Contest(scores(values, 0.1), [], "v0", 0.0)
        for each in (*decided.against.values(), *decided.pairs.values(), *decided.guesses.values()):
            assert each.holds != (each.interval.low <= 0 <= each.interval.high)


# ---- simulations ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [3, 5, 10])
def test_intervals_cover_as_often_as_they_say(n):
    values = np.random.default_rng(n).normal(0.7, 0.1, (4000, n)).tolist()
    covered = [each.low <= 0.7 <= each.high for each in map(intervals.estimate, values)]
    assert 0.93 <= np.mean(covered) <= 0.97
    # The normal quantile, which few seeds tempt to, covers less: the test can tell.
    short = [
        abs(each.mean - 0.7) * intervals.quantile(n - 1) <= 1.96 * (each.half or 0)
        for each in map(intervals.estimate, values)
    ]
    assert np.mean(short) < (0.93 if n < 10 else 0.94)


@pytest.mark.parametrize("n", [2, 3, 5])
def test_intervals_with_an_error_of_sampling_never_cover_less(n):
    rng = np.random.default_rng(n)
    for ratio in (0.5, 2.0):
        of_examples = ratio / math.sqrt(n)
        values = rng.normal(0, 1, (2000, n)) + rng.normal(0, of_examples, (2000, 1))
        half = intervals.quantile(math.inf) * of_examples
        covered = [each.low <= 0 <= each.high for each in (intervals.estimate(row, half) for row in values.tolist())]
        assert np.mean(covered) >= 0.94


def test_families_of_true_nulls_find_nothing_more_often_than_they_may():
    """20 differences without one, 5 seeds: at most 5 % of the families say one holds, and two standard errors."""
    rng = np.random.default_rng(0)
    families, corrected, alone = 1000, 0, 0
    for values in rng.normal(0, 1, (families, 20, 5)):
        decided = intervals.holm(
            {at: Difference(v.mean(), v.std(ddof=1) / math.sqrt(5), 5) for at, v in enumerate(values)}
        )
        corrected += any(each.holds for each in decided.values())
        alone += any(each.difference.p <= intervals.LEVEL for each in decided.values())
    assert corrected / families <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / families)
    assert alone / families > 0.5  # 1 - 0.95**20 is 0.64: without the correction the test fails


def test_no_variant_of_a_sweep_without_differences_is_called_better():
    """8 variants alike on shared seeds: against the reference, among all pairs, and the best that the scores chose."""
    rng = np.random.default_rng(3)
    families, against, pairs, chosen, naive = 300, 0, 0, 0, 0
    for shared, own in zip(rng.normal(0, 1, (families, 1, 5)), rng.normal(0, 1, (families, 8, 5)), strict=True):
        contest = Contest(scores(shared + own), [], "v0", None)
        against += any(each.holds for each in contest.against.values())
        pairs += any(each.holds for each in contest.pairs.values())
        ranked = sorted(contest.variants, key=lambda name: -np.mean(list(contest.variants[name].by_seed.values())))
        last = contest.pairs.get((ranked[0], ranked[-1])) or contest.pairs[ranked[-1], ranked[0]]
        chosen += last.holds
        naive += last.difference.p <= intervals.LEVEL
    bound = 0.05 + 2 * math.sqrt(0.05 * 0.95 / families)
    assert against / families <= bound and pairs / families <= bound and chosen <= pairs
    assert naive / families > 0.2  # the best and the worst of one sweep differ "significantly" without the correction


# ---- who is tested against whom ---------------------------------------------------------------------------------


def test_a_pair_with_the_reference_has_one_verdict_whoever_asks():
    rng = np.random.default_rng(4)
    contest = Contest(scores(rng.normal(0, 1, (4, 3))), scores(rng.normal(0, 1, (1, 3))), "v0", None)
    one, other = contest.between("v2", "v0"), contest.between("v0", "v2")
    assert one is not None and other is not None and one is contest.against["v2"]
    assert other.difference.mean == -one.difference.mean and other.adjusted == one.adjusted
    assert contest.between("v1", "v2") is contest.pairs["v1", "v2"] and len(contest.pairs) == 6
    assert contest.between("v1", "nobody") is None


def test_one_seed_is_tested_by_the_choice_of_examples_alone():
    untested = Contest(scores(np.array([[0.9], [0.1]])), [], "v0", 0.5)
    assert untested.against == {} and untested.pairs == {} and untested.guesses == {}
    tested = Contest(scores(np.array([[0.9], [0.1], [0.88]]), 0.05), [], "v0", 0.5)
    assert {name: each.holds for name, each in tested.against.items()} == {"v1": True, "v2": False}
    assert all(each.holds for each in tested.guesses.values())
