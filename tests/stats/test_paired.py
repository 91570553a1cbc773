import itertools
import math

import numpy as np
import pytest
from scipy.optimize import brentq, minimize_scalar
from scipy.special import xlogy
from scipy.stats import binom, binomtest, norm

from lrrobust.stats import (
    discrete_bonferroni_level,
    holm,
    mcnemar_p_value,
    mcnemar_power,
    paired,
    paired_difference_interval,
    smallest_detectable_difference,
)


@pytest.mark.parametrize("b, c", [(0, 0), (1, 0), (5, 5), (3, 11), (40, 21), (700, 610)])
def test_mcnemar_is_the_binomial_test(b, c):
    expected = binomtest(b, b + c).pvalue if b + c else 1.0
    assert mcnemar_p_value(b, c) == pytest.approx(expected, rel=1e-9)
    assert mcnemar_p_value([[c, b]], [[b, c]]) == pytest.approx(np.full((1, 2), expected), rel=1e-9)


@pytest.mark.parametrize("b, c", [(0, 0), (10, 0), (0, 10), (14, 4), (3, 3), (400, 350)])
def test_one_sided_mcnemar_is_the_upper_tail(b, c):
    expected = binomtest(b, b + c, alternative="greater").pvalue if b + c else 1.0
    assert mcnemar_p_value(b, c, alternative="greater") == pytest.approx(expected, rel=1e-9)


class TestHolm:
    def test_is_the_closed_test_of_bonferroni(self):
        # Its definition, not its algorithm: H is rejected when Bonferroni rejects every set that holds H.
        p = np.random.default_rng(0).uniform(0, [[0.3], [1.0]], (10, 2, 4)).reshape(20, 4)
        for row, found in zip(p, holm(p)):
            for i in range(4):
                sets = [s for size in range(1, 5) for s in itertools.combinations(range(4), size) if i in s]
                assert found[i] == pytest.approx(max(min(1, len(s) * min(row[list(s)])) for s in sets))

    def test_one_and_none(self):
        assert holm([0.3]).tolist() == [0.3]
        assert holm(np.ones((2, 0))).shape == (2, 0)


def score_by_likelihood(b, c, n, difference):
    """Score statistic of a difference, with the nuisance parameter found by maximising the likelihood."""

    def loss(q):  # q = P(control only), P(treatment only) = q + difference
        return -(xlogy(b, q + difference) + xlogy(c, q) + xlogy(n - b - c, 1 - 2 * q - difference))

    q = minimize_scalar(loss, bounds=(max(0, -difference), (1 - difference) / 2), method="bounded", options={"xatol": 1e-13}).x
    return (b - c - n * difference) / math.sqrt(n * (2 * q + difference - difference**2))


class TestInterval:
    @pytest.mark.parametrize("b, c, n", [(30, 12, 500), (5, 1, 20), (0, 7, 40), (9, 0, 25), (100, 90, 200)])
    @pytest.mark.parametrize("confidence", [0.9, 0.95])
    def test_limits_solve_the_score_equation(self, b, c, n, confidence):
        z = norm.ppf((1 + confidence) / 2)
        estimate = (b - c) / n
        low = brentq(lambda d: score_by_likelihood(b, c, n, d) - z, -0.999, estimate - 1e-9, xtol=1e-10)
        high = brentq(lambda d: score_by_likelihood(b, c, n, d) + z, estimate + 1e-9, 0.999, xtol=1e-10)
        assert paired_difference_interval(b, c, n, confidence) == pytest.approx((low, high), abs=1e-5)

    def test_without_discordant_images_by_hand(self):
        # Then n D / sqrt(n D (1 - D)) = z, hence D = z^2 / (n + z^2).
        z2 = norm.ppf(0.975) ** 2
        assert paired_difference_interval(0, 0, 50) == pytest.approx((-z2 / (50 + z2), z2 / (50 + z2)))

    def test_ends(self):
        assert paired_difference_interval(10, 0, 10)[1] == 1
        assert paired_difference_interval(0, 10, 10)[0] == -1
        assert paired_difference_interval(0, 0, 0) == (-1, 1)

    def test_arrays_are_the_same_one_by_one(self):
        b, c, n = np.array([[3, 8], [0, 50]]), np.array([[4, 1], [0, 2]]), np.array([40, 200])
        low, high = paired_difference_interval(b, c, n)
        for i, j in np.ndindex(2, 2):
            assert (low[i, j], high[i, j]) == paired_difference_interval(b[i, j], c[i, j], n[j])

    def test_covers_as_often_as_it_says(self):
        # 200 images, 9 % and 4 % discordant either way: the intended 95 %, up to the grain of small counts.
        counts = np.random.default_rng(0).multinomial(200, [0.09, 0.04, 0.87], size=20_000)
        low, high = paired_difference_interval(counts[:, 0], counts[:, 1], 200)
        assert np.mean((low <= 0.05) & (0.05 <= high)) == pytest.approx(0.95, abs=0.01)

    @pytest.mark.parametrize(
        "arguments", [(3, 3, 5), ([1, 3], [1, 3], 5), (-1, 0, 5), (0, -1, 5), (1, 1, 5, 0.0), (1, 1, 5, 1.0)]
    )
    def test_refuses_what_cannot_be(self, arguments):
        with pytest.raises(ValueError):
            paired_difference_interval(*arguments)


def power_by_enumeration(n, b_share, c_share, level, at_least):
    total = 0.0
    for k in range(n + 1):
        for b in range(k + 1):
            if mcnemar_p_value(b, k - b) <= level and 2 * b > k and 2 * b - k >= n * at_least - 1e-9:
                weight = binom.pmf(k, n, b_share + c_share)
                total += weight * binom.pmf(b, k, b_share / (b_share + c_share))
    return total


class TestPower:
    @pytest.mark.parametrize("at_least", [0.0, 0.1, 0.25])
    @pytest.mark.parametrize("discordance, difference", [(0.3, 0.2), (0.2, 0.2), (1.0, 0.4), (1.0, 1.0)])
    def test_agrees_with_enumeration(self, discordance, difference, at_least):
        b_share, c_share = (discordance + difference) / 2, (discordance - difference) / 2
        expected = power_by_enumeration(40, b_share, c_share, 0.05, at_least)
        assert mcnemar_power(40, discordance, difference, 0.05, at_least) == pytest.approx(expected, abs=1e-9)

    @pytest.mark.parametrize("level", [0.05, 0.004])
    def test_critical_counts_are_the_tests(self, level):
        for k, needed in enumerate(paired._critical_counts(level, 299).tolist()):
            if needed <= k:
                assert mcnemar_p_value(needed, k - needed) <= level
            assert needed == 0 or mcnemar_p_value(needed - 1, k - needed + 1) > level

    def test_smallest_difference_is_where_the_power_is_reached(self):
        found = smallest_detectable_difference(1000, 0.15, level=0.01, power=0.9, at_least=0.02)
        assert mcnemar_power(1000, 0.15, found, 0.01, 0.02) >= 0.9
        assert mcnemar_power(1000, 0.15, found - 1e-4, 0.01, 0.02) < 0.9
        counts = np.random.default_rng(1).multinomial(1000, [(0.15 + found) / 2, (0.15 - found) / 2, 0.85], 20_000)
        b, c = counts[:, 0], counts[:, 1]
        assert np.mean((mcnemar_p_value(b, c) <= 0.01) & (b - c >= 20)) == pytest.approx(0.9, abs=0.01)

    def test_what_must_be_seen_is_part_of_it(self):
        free = smallest_detectable_difference(5000, 0.1, 0.05, 0.8)
        assert free < 0.02 < smallest_detectable_difference(5000, 0.1, 0.05, 0.8, at_least=0.02)

    def test_few_images_show_nothing(self):
        # Five discordant images on one side have p = 1/16, six 1/32.
        assert smallest_detectable_difference(5, 0.2, 0.05, 0.8) is None
        assert smallest_detectable_difference(6, 0.2, 0.05, 0.8) == pytest.approx(0.8 ** (1 / 6), abs=1e-4)
        assert smallest_detectable_difference(0, 0.0, 0.05, 0.8) is None


def test_tests_that_can_never_reject_do_not_share_the_level():
    assert discrete_bonferroni_level([4, 4, 4], 0.05) == 0.05
    assert discrete_bonferroni_level([5, 4, 4], 0.05) == 0.05
    # Two may reject at 5 %; shared between two, 2^-5 is out of reach again.
    assert discrete_bonferroni_level([5, 5, 4], 0.05) == 0.025
    assert discrete_bonferroni_level([20] * 7, 0.07) == pytest.approx(0.01)


def test_the_level_holds_for_tests_together():
    """Exactly, by the probabilities of independent tests; any dependence is covered by Bonferroni."""
    for discordant in ([5, 6, 7], [3, 9, 12, 30], [8] * 6):
        level = discrete_bonferroni_level(discordant, 0.05)
        kept = 1.0
        for d in discordant:
            p_values = mcnemar_p_value(np.arange(d + 1), d - np.arange(d + 1), "greater")
            kept *= 1 - binom.pmf(np.arange(d + 1), d, 0.5)[p_values <= level].sum()
        assert 0.003 < 1 - kept <= 0.05
