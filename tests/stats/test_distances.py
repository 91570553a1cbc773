import itertools
import math

import numpy as np
import pytest
from scipy.stats import binomtest, wilcoxon

from lrrobust.stats import compare_distances, median_with_failures, survival

INF = math.inf


@pytest.mark.parametrize(
    "distances, n_attacked, median",
    [
        ([3.0, 1.0, 2.0], 3, 2.0),
        ([1.0, 2.0], 2, 1.5),
        ([1.0, 2.0], 3, 2.0),
        ([1.0, 2.0], 4, math.inf),
        ([1.0, 2.0, 3.0], 4, 2.5),
        ([1.0], 4, math.inf),
        ([], 1, math.inf),
    ],
)
def test_median_counts_failures_as_infinite(distances, n_attacked, median):
    assert median_with_failures(distances, n_attacked) == median


def test_median_of_nothing_is_unknown():
    assert math.isnan(median_with_failures([], 0))


@pytest.mark.parametrize(
    "distances, n_attacked", [([1.0, 2.0], 1), ([math.nan], 2), ([math.inf], 2), ([-1.0], 2), ([[1.0]], 2)]
)
def test_median_refuses_what_is_no_distance(distances, n_attacked):
    with pytest.raises(ValueError, match="distances"):
        median_with_failures(distances, n_attacked)


def test_finite_distances_agree_with_scipy():
    generator = np.random.default_rng(0)
    # Exact up to 50 pairs, then the normal approximation.
    for n in (12, 50, 51, 200):
        control = generator.gamma(2.0, 0.1, n)
        treatment = control + generator.normal(0.03, 0.1, n).clip(-control)
        found = compare_distances(treatment, control)
        expected = wilcoxon(treatment, control)
        assert found.wilcoxon_p_value == pytest.approx(expected.pvalue, rel=1e-9)
        assert found.sign_p_value == pytest.approx(binomtest(found.treatment_farther, n).pvalue, rel=1e-9)
        # scipy's statistic is the smaller sum of ranks, and both sums make n (n + 1) / 2.
        assert 1 - abs(found.rank_biserial) == pytest.approx(2 * expected.statistic / (n * (n + 1) / 2))


def test_ties_by_counting_all_signs():
    # Ranks 2, 2, 2, 4.5, 4.5, 6: of all 64 choices of a side, those at least as far from the middle as what is seen.
    found = compare_distances([1, 1, 2, 3, 3, INF], [0, 0, 3, 1, 1, 7])
    ranks, seen = np.array([2, 2, 2, 4.5, 4.5, 6]), 2 + 2 + 4.5 + 4.5 + 6
    sums = np.array(list(itertools.product([0, 1], repeat=6))) @ ranks
    assert found.wilcoxon_p_value == pytest.approx((abs(sums - 10.5) >= abs(seen - 10.5)).mean())
    many = np.random.default_rng(1).integers(-3, 9, 80)
    expected = wilcoxon(many, method="asymptotic", zero_method="wilcox")
    assert compare_distances(many + 10, np.full(80, 10)).wilcoxon_p_value == pytest.approx(expected.pvalue, rel=1e-9)


def test_failures_by_hand():
    # Differences +inf, -inf, +1, -2, +3 and two ties: ranks 4.5, 4.5, 1, 2, 3.
    found = compare_distances([INF, 1, 2, 1, 4, 5, INF], [1, INF, 1, 3, 1, 5, INF])
    assert (found.treatment_farther, found.control_farther) == (3, 2)
    assert found.rank_biserial == pytest.approx((4.5 + 1 + 3 - 4.5 - 2) / 15)
    assert found.sign_p_value == 1
    assert compare_distances([1, 2], [2, 1]).wilcoxon_p_value == 1


def test_without_differences_nothing_is_shown():
    assert compare_distances([0, INF, 0.5], [0, INF, 0.5]) == (0, 0, 1.0, 1.0, 0.0)
    assert compare_distances([], []) == (0, 0, 1.0, 1.0, 0.0)


def test_treatment_and_control_are_mirror_images():
    there, back = compare_distances([3, 1, INF, 5], [1, 1.5, 2, 0]), compare_distances([1, 1.5, 2, 0], [3, 1, INF, 5])
    assert there.rank_biserial == -back.rank_biserial > 0
    assert there[2:4] == back[2:4]


@pytest.mark.parametrize("treatment, control", [([math.nan], [1.0]), ([-1.0], [1.0]), ([1.0, 2.0], [1.0])])
def test_what_is_no_pair_of_distances_is_refused(treatment, control):
    with pytest.raises(ValueError, match="distances"):
        compare_distances(treatment, control)


def test_survival_steps_at_each_distance():
    values = survival([0.0, 0.1, 0.1, 0.4, INF], at=[0, 0.05, 0.1, 0.39, 0.4, 99])
    assert values == pytest.approx([4 / 5, 4 / 5, 2 / 5, 2 / 5, 1 / 5, 1 / 5])
