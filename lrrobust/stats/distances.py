"""Distances of the nearest adversarial images, a failed attack counting as an infinite one."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtr

from lrrobust.stats.paired import mcnemar_p_value

#: Pairs up to which the signed-rank test is exact.
_MOST_EXACT = 50


def median_with_failures(distances: ArrayLike, n_attacked: int) -> float:
    """Median distance over all attacked images, a failed attack counting as an infinite distance.

    Args:
        distances: of the successes only, finite and zero or more.
        n_attacked: successes and failures together.

    Returns:
        The median in the unit of `distances`; infinity when at least half of the attacks failed (for
        an even number, the mean of the two in the middle, so infinite as soon as one of them is);
        NaN when nothing was attacked.

    Raises:
        ValueError: a distance is negative or not finite, or there are more of them than images.

    >>> median_with_failures([0.1, 0.3], n_attacked=3)
    0.3
    >>> median_with_failures([0.1, 0.3], n_attacked=4)
    inf
    """
    distances = np.asarray(distances, dtype=np.float64)
    if distances.ndim != 1 or not (np.isfinite(distances) & (distances >= 0)).all():
        raise ValueError("distances must be a flat array of finite numbers, zero or more")
    if len(distances) > n_attacked:
        raise ValueError(f"got {len(distances)} distances but only {n_attacked=}")
    if n_attacked == 0:
        return math.nan
    return float(np.median(np.append(distances, np.full(n_attacked - len(distances), np.inf))))


class PairedDistances(NamedTuple):
    """How two models' distances compare, image by image.

    Attributes:
        treatment_farther, control_farther: images of a larger distance under either model; the rest are ties.
        sign_p_value: exact two-sided sign test of the two counts.
        wilcoxon_p_value: two-sided signed-rank test.
        rank_biserial: effect size in [-1, 1], positive where the treatment's distances are larger; 0 without
            differences.
    """

    treatment_farther: int
    control_farther: int
    sign_p_value: float
    wilcoxon_p_value: float
    rank_biserial: float


def compare_distances(treatment: ArrayLike, control: ArrayLike) -> PairedDistances:
    """Sign test, Wilcoxon signed-rank test and effect size of paired distances.

    Both tests leave out pairs that are equal, two failures among them. A pair of which one attack failed differs by
    infinity, and such pairs share the highest rank: the sign test needs no more than the order within a pair, the
    signed-rank test takes a failure for the largest difference there is. The effect size is the matched-pairs
    rank-biserial correlation, (W+ - W-) / (W+ + W-).

    Args:
        treatment, control: (n,) of the same images, zero or more, infinity for a failed attack.

    Raises:
        ValueError: an array is not such.

    Source: Wilcoxon, Individual comparisons by ranking methods, Biometrics Bulletin 1, 1945 (exact for up to 50 pairs that
    differ, else the normal approximation with correction for ties); Kerby, The simple difference formula, Comprehensive
    Psychology 3, 2014.

    >>> compare_distances([0.3, 0.4, math.inf, 0.2], [0.1, 0.4, 0.5, 0.3])[:3]
    (2, 1, 1.0)
    """
    treatment, control = _checked(treatment), _checked(control)
    if treatment.shape != control.shape:
        raise ValueError(f"expected distances of the same images, got {treatment.shape} and {control.shape}")
    is_different = treatment != control
    difference = treatment[is_different] - control[is_different]
    farther, nearer = int((difference > 0).sum()), int((difference < 0).sum())
    sign_p_value = float(mcnemar_p_value(farther, nearer))
    if not len(difference):
        return PairedDistances(0, 0, sign_p_value, 1.0, 0.0)
    _, place, counts = np.unique(np.abs(difference), return_inverse=True, return_counts=True)
    # Ties share the mean of their ranks; doubled, all are whole numbers.
    doubled_ranks = (2 * np.cumsum(counts) - counts + 1)[place]
    positive, total = int(doubled_ranks[difference > 0].sum()), int(doubled_ranks.sum())
    p_value = _signed_rank_p_value(positive, doubled_ranks)
    return PairedDistances(farther, nearer, sign_p_value, p_value, (2 * positive - total) / total)


def _signed_rank_p_value(positive: int, doubled_ranks: NDArray[np.int64]) -> float:
    """Two-sided: twice the smaller tail of the sum of ranks, doubled, that fall to one side with probability 1/2 each."""
    total = int(doubled_ranks.sum())
    if len(doubled_ranks) <= _MOST_EXACT:
        # Share of the 2^n choices of a side for each rank that reach each sum, rank by rank.
        chances = np.zeros(total + 1)
        chances[0] = 1.0
        for rank in doubled_ranks.tolist():
            chances[rank:] += chances[:-rank]
            chances /= 2
        return min(1.0, 2 * float(chances[: min(positive, total - positive) + 1].sum()))
    # The variance of a sum of ranks is a quarter of the sum of their squares, ties included.
    deviation = abs(2 * positive - total) / 2
    spread = np.sqrt((doubled_ranks.astype(np.float64) ** 2).sum()) / 2
    return float(2 * ndtr(-deviation / spread))


def survival(distances: ArrayLike, at: ArrayLike) -> NDArray[np.float64]:
    """Share of images whose distance exceeds each value of `at`.

    Args:
        distances: (n,), at least one, zero or more, infinity for a failed attack.
        at: (m,).

    Returns:
        (m,), fractions.

    >>> survival([0.0, 0.2, math.inf, 0.2], at=[0.0, 0.1, 0.2]).tolist()
    [0.75, 0.75, 0.25]
    """
    ordered = np.sort(_checked(distances))
    return 1 - np.searchsorted(ordered, np.asarray(at, dtype=np.float64), side="right") / len(ordered)


def _checked(distances: ArrayLike) -> NDArray[np.float64]:
    distances = np.asarray(distances, dtype=np.float64)
    if distances.ndim != 1 or not (distances >= 0).all():
        raise ValueError("distances must be a flat array of numbers, zero or more")
    return distances
