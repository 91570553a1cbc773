"""The rule that turns paired counts into a verdict, and the probabilities with which it errs.

**What is compared.** A row is one norm and one eps. The count is of images that survive the worst case over the
attacks of the norm, so that no attack can be chosen afterwards. Every row is counted in three populations: all
images, those both models classify correctly, and all at matched clean accuracy. They differ where one model is
merely more accurate, and a claim of robustness has to hold in each. Below, d is the true difference of robust
accuracy in the direction of the claim, alpha the significance, and delta the smallest difference that matters.

**Supported** asks for three things:

1. Superiority: in every norm there is a row in which, in every population, the exact McNemar test rejects d = 0 at
   level alpha after Holm's adjustment over all rows of the population, in the claim's direction, and the difference
   seen is at least delta.
2. Nowhere worse by what matters: in every row of every population the interval of confidence 1 - alpha lies above
   -delta.
3. Nowhere worse: no row of any population is rejected, after Holm, in the opposite direction.

It is wrong when, in some population, d <= 0 in all rows of some norm, or d <= -delta in some row. The first: let S be
those rows of that population. Before the first wrong rejection in S at most the other rows have been rejected (3
leaves none in the opposite direction), so Holm's procedure tests S at level alpha / |S| or less, one-sided half of that:
summed over S, alpha / 2, however the rows depend on each other. The second takes an interval that misses on one
side: alpha / 2. All populations and norms have to agree, so adding some cannot raise this (intersection-union): no
adjustment for their number is due.

**Refuted** asks for one of two things; it and *supported* exclude each other:

1. No advantage that matters: in every row of every population the interval lies below delta.
2. Harm: there is a row in which, in every population, the test rejects after Holm in the opposite direction and the
   difference seen is at most -delta; and no row of any population is rejected in the claim's direction.

It is wrong when the claim is true, here: in some population d >= delta in some row and d >= 0 in all. The first takes an
interval that misses on one side, alpha / 2. The second takes a smallest p-value on the wrong side, at most
alpha / rows, one-sided half of that, summed over rows alpha / 2. Together at most alpha.

**Inconclusive** is everything else: too few images, curves that cross, or populations that disagree.

Intervals are of asymptotic score tests, whose one-sided errors can exceed alpha / 2 by a few tenths of a point in
small samples; for *supported* alpha / 2 leaves room for that, for *refuted* the bound is a sum that simulations
stay well below. McNemar's test is exact. In the population of matched accuracy the number of images that only one
model classifies correctly is fixed by construction, which lowers the variance of the counts below the binomial: the
test there is conservative. Verdicts are about the images' distribution and these two networks: another training
seed is another network.

What the rule does not know: whether the attacks worked. Safeguards (`lrrobust.verdict.safeguards`) see to that.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lrrobust.stats import holm, mcnemar_p_value, paired_difference_interval, smallest_detectable_difference


@dataclass(frozen=True)
class PairedTests:
    """Tests of rows; every array is (..., populations, rows), Holm's family is the last axis."""

    n: NDArray[np.int64]
    treatment_only: NDArray[np.int64]
    control_only: NDArray[np.int64]
    difference: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    p_value: NDArray[np.float64]
    p_holm: NDArray[np.float64]


@dataclass(frozen=True)
class Findings:
    """What the tests show of a claim, before safeguards; bool.

    Attributes:
        is_better, is_worse: superiority and harm in every population, (..., rows).
        is_anywhere_better, is_anywhere_worse: some row of some population is rejected in that direction (...).
        may_matter_against, may_matter_for: some population's interval reaches -delta, or delta, (..., rows).
        is_supported, is_refuted: the verdict (...).
    """

    is_better: NDArray[np.bool_]
    is_worse: NDArray[np.bool_]
    is_anywhere_better: NDArray[np.bool_]
    is_anywhere_worse: NDArray[np.bool_]
    may_matter_against: NDArray[np.bool_]
    may_matter_for: NDArray[np.bool_]
    is_supported: NDArray[np.bool_]
    is_refuted: NDArray[np.bool_]


def compare_pairs(treatment_only: ArrayLike, control_only: ArrayLike, n: ArrayLike, significance: float) -> PairedTests:
    """Tests for counts of discordant images among n; without images nothing is known."""
    b, c, n = np.broadcast_arrays(*(np.asarray(count, dtype=np.int64) for count in (treatment_only, control_only, n)))
    low, high = paired_difference_interval(b, c, n, 1 - significance)
    p_value = mcnemar_p_value(b, c)
    return PairedTests(n, b, c, (b - c) / np.maximum(n, 1), low, high, p_value, holm(p_value))


def find(tests: PairedTests, norms: ArrayLike, *, is_more: bool, significance: float, smallest_difference: float) -> Findings:
    """Applies the rule to the decisive rows.

    Args:
        tests: of the decisive rows, at least one.
        norms: (rows,), the norm of each.
        is_more: the claim says that the treatment is more robust; otherwise less.
        significance, smallest_difference: alpha and delta.
    """
    gain = tests.difference if is_more else -tests.difference
    low, high = (tests.low, tests.high) if is_more else (-tests.high, -tests.low)
    is_significant = tests.p_holm <= significance
    # Differences are fractions of counts; the slack keeps 20 of 1000 from falling short of 0.02.
    reached = smallest_difference - 1e-12
    is_better = (is_significant & (gain >= reached)).all(axis=-2)
    is_worse = (is_significant & (gain <= -reached)).all(axis=-2)
    may_matter_against = (low <= -smallest_difference).any(axis=-2)
    may_matter_for = (high >= smallest_difference).any(axis=-2)
    is_anywhere_better = (is_significant & (gain > 0)).any(axis=(-2, -1))
    is_anywhere_worse = (is_significant & (gain < 0)).any(axis=(-2, -1))

    norms = np.asarray(norms)
    in_every_norm = np.logical_and.reduce([is_better[..., norms == norm].any(axis=-1) for norm in np.unique(norms)])
    is_supported = in_every_norm & ~may_matter_against.any(axis=-1) & ~is_anywhere_worse
    is_refuted = ~may_matter_for.any(axis=-1) | (is_worse.any(axis=-1) & ~is_anywhere_better)
    return Findings(
        is_better,
        is_worse,
        is_anywhere_better,
        is_anywhere_worse,
        may_matter_against,
        may_matter_for,
        is_supported,
        is_refuted,
    )


def smallest_detectable(
    n: int,
    discordant: int,
    *,
    rows: int,
    norms: int,
    populations: int,
    significance: float,
    power: float,
    smallest_difference: float,
) -> float | None:
    """Smallest true difference of one row that *supported* would have found; see `Comparison.smallest_detectable`.

    The test is taken at significance / rows, the strictest level that Holm's procedure asks for. Superiority takes a row
    in every norm, in every population: the probability of missing is shared out between them (Bonferroni), so that
    all are passed with the power promised. That nothing be worse elsewhere is not part of the promise.
    """
    if n == 0:
        return None
    missed = (1 - power) / (norms * populations)
    return smallest_detectable_difference(n, discordant / n, significance / rows, 1 - missed, smallest_difference)
