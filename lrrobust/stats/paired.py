"""Two models on the same images: what the images that only one of them gets right say.

Counts may be arrays of any shape; `treatment_only` (robust under the treatment alone) and `control_only` are the
two kinds of discordant images among `n`. Differences are (treatment_only - control_only) / n.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import bdtr, bdtrc, gammaln, ndtri, xlog1py, xlogy

#: Halvings of [-1, 1] that leave an interval's limits exact to 1e-12.
_HALVINGS = 41

#: Differences below this are not told apart by `smallest_detectable_difference`.
_RESOLUTION = 1e-4


def mcnemar_p_value(
    treatment_only: ArrayLike, control_only: ArrayLike, alternative: Literal["two-sided", "greater"] = "two-sided"
) -> NDArray[np.float64]:
    """Exact test that discordant images fall to either side with probability 1/2.

    Two-sided: twice the smaller tail of the binomial distribution, at most 1. "greater", against more of
    `treatment_only`: the probability of at least as many. 1 without discordant images. Exact whatever the number of
    images, and conservative: its size never exceeds the level.

    Source: McNemar, Note on the sampling error of the difference between correlated proportions or percentages,
    Psychometrika 12, 1947; exact form in Agresti, Categorical Data Analysis, 3rd edition, section 11.1.

    >>> print(mcnemar_p_value(8, 1))
    0.0390625
    >>> print(mcnemar_p_value([0, 3], [0, 3]))
    [1. 1.]
    """
    b, c = _counts(treatment_only, control_only)
    n = (b + c).astype(np.int64)
    if alternative == "greater":
        return bdtr(c, n, 0.5)
    return np.minimum(1.0, 2.0 * bdtr(np.minimum(b, c), n, 0.5))


def holm(p_values: ArrayLike) -> NDArray[np.float64]:
    """P-values adjusted for their number, along the last axis: reject those at or below the level.

    Keeps the probability of any wrong rejection at the level, however the tests depend on each other.

    Source: Holm, A simple sequentially rejective multiple test procedure, Scand. J. Statist. 6, 1979.

    >>> holm([0.01, 0.04, 0.03, 0.005]).tolist()
    [0.03, 0.06, 0.06, 0.02]
    """
    p = np.asarray(p_values, dtype=np.float64)
    count = p.shape[-1]
    order = np.argsort(p, axis=-1, kind="stable")
    scaled = np.take_along_axis(p, order, axis=-1) * np.arange(count, 0, -1)
    adjusted = np.minimum(1.0, np.maximum.accumulate(scaled, axis=-1))
    result = np.empty_like(p)
    np.put_along_axis(result, order, adjusted, axis=-1)
    return result


def discrete_bonferroni_level(discordant: ArrayLike, significance: float) -> float:
    """Level of each of several one-sided exact McNemar tests that keeps the probability of any wrong rejection.

    Bonferroni's, but tests with too few discordant images ever to reject do not count as tests: with d of them, no
    p-value is below 2^-d. Holds however the tests depend on each other.

    Args:
        discordant: (tests,) counts, zero or more.
        significance: of all tests together.

    Source: Tarone, A modified Bonferroni method for discrete data, Biometrics 46, 1990.

    >>> discrete_bonferroni_level([1, 2, 8, 0], 0.05), discrete_bonferroni_level([7, 8, 9, 2], 0.06)
    (0.05, 0.02)
    """
    attainable = 0.5 ** np.asarray(discordant, dtype=np.float64)
    # With as many tests as there are all count, so this ends; at most as many count as share the level.
    tests = next(k for k in range(1, len(attainable) + 1) if (attainable <= significance / k).sum() <= k)
    return significance / tests


def paired_difference_interval(
    treatment_only: ArrayLike, control_only: ArrayLike, n: ArrayLike, confidence: float = 0.95
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Tango's score interval for the difference of two proportions seen on the same images.

    Holds the differences D that the score test does not reject, with the discordance estimated under D:
    |b - c - n D| <= z sqrt(n (2 q + D (1 - D))), where q is the probability of `control_only` that is most likely
    given D. Never empty, inside [-1, 1], of positive width also without discordant images, and on Fagerland,
    Lydersen and Laake's (2014) list of recommended intervals.

    Args:
        treatment_only, control_only: counts b and c, zero or more.
        n: images, at least b + c; where it is 0 nothing is known and the interval is (-1, 1).
        confidence: between 0 and 1, both excluded.

    Returns:
        low and high.

    Raises:
        ValueError: an argument is out of its range.

    Source: Tango, Equivalence test and confidence interval for the difference in proportions for the paired-sample
    design, Stat. Med. 17, 1998, equations 6 to 11.

    >>> low, high = paired_difference_interval(30, 12, 500)
    >>> print(f"{low:.4f} {high:.4f}")
    0.0111 0.0632
    """
    b, c, n = np.broadcast_arrays(*_counts(treatment_only, control_only), np.asarray(n, dtype=np.float64))
    if not (b + c <= n).all():
        raise ValueError("expected at least as many images as discordant ones")
    if not 0 < confidence < 1:
        raise ValueError(f"expected 0 < confidence < 1, got {confidence=}")
    z = float(ndtri((1 + confidence) / 2))
    estimate = (b - c) / np.maximum(n, 1)

    def deviation(difference: NDArray[np.float64]) -> NDArray[np.float64]:
        """Half-width of what the test accepts around n * difference."""
        linear = (2 * n - b + c) * difference - b - c
        root = np.sqrt(np.maximum(linear**2 + 8 * n * c * difference * (1 - difference), 0.0))
        q = (root - linear) / np.maximum(4 * n, 1)
        return z * np.sqrt(np.maximum(n * (2 * q + difference * (1 - difference)), 0.0))

    limits = []
    for sign in (-1.0, 1.0):
        accepted, rejected = estimate.astype(np.float64), np.full(estimate.shape, sign)
        for _ in range(_HALVINGS):
            middle = (accepted + rejected) / 2
            is_accepted = sign * (n * middle - b + c) <= deviation(middle)
            accepted, rejected = np.where(is_accepted, middle, accepted), np.where(is_accepted, rejected, middle)
        limits.append(np.where(n == 0, sign, accepted))
    return limits[0], limits[1]


def mcnemar_power(n: int, discordance: float, difference: float, level: float, at_least: float = 0.0) -> float:
    """Probability that the exact test finds a true difference: p <= level, in its direction, and seen at least so large.

    Sums over the number of discordant images, which is binomial, the probability that enough of them are the
    treatment's.

    Args:
        n: images.
        discordance: probability of a discordant image, from `difference` to 1.
        difference: true difference, more than 0.
        level: of the two-sided test.
        at_least: difference that must be seen besides.

    >>> f"{mcnemar_power(500, discordance=0.2, difference=0.06, level=0.05):.2f}"
    '0.84'
    """
    spread = 8 * math.sqrt(n * discordance * (1 - discordance)) + 10
    fewest, most = max(0, math.floor(n * discordance - spread)), min(n, math.ceil(n * discordance + spread))
    k = np.arange(fewest, most + 1)
    needed = _critical_counts(level, 1 << max(most, 1).bit_length())[k]
    # A difference of at_least is seen from 2 x - k >= n at_least on; the slack is for its rounding.
    needed = np.maximum(needed, np.ceil((n * at_least + k) / 2 - 1e-9).astype(np.int64))
    share = min(1.0, (discordance + difference) / (2 * discordance))
    choices = gammaln(n + 1) - gammaln(k + 1) - gammaln(n - k + 1)
    log_probability = choices + xlogy(k, discordance) + xlog1py(n - k, -discordance)
    return float(np.sum(np.exp(log_probability) * _upper_tail(needed, k, share)))


def smallest_detectable_difference(
    n: int, discordance: float, level: float, power: float, at_least: float = 0.0
) -> float | None:
    """Smallest true difference that the exact test finds with a given power.

    Args:
        n: images.
        discordance: share of discordant images, as seen. A larger difference needs more of them: it is then taken
            to be made of the treatment's alone.
        level: of the two-sided test.
        power: between 0 and 1, both excluded.
        at_least: difference that must be seen besides.

    Returns:
        The difference, rounded up by at most 1e-4; None where not even a difference of 1 is found.

    >>> smallest_detectable_difference(500, 0.2, level=0.05, power=0.8)
    0.0575
    >>> smallest_detectable_difference(4, 0.5, level=0.05, power=0.8) is None
    True
    """

    def is_found(difference: float) -> bool:
        return mcnemar_power(n, max(discordance, difference), difference, level, at_least) >= power

    if n == 0 or not is_found(1.0):
        return None
    # Within steps of what the normal approximation says, as every try is a sum over hundreds of binomial tails.
    missed, found = 0, round(1 / _RESOLUTION)
    expected = max(at_least, float(ndtri(power) - ndtri(level / 2)) * math.sqrt(discordance / n))
    tried, step = min(max(round(expected / _RESOLUTION), 1), found - 1), 16
    while missed < tried < found:
        if is_found(tried * _RESOLUTION):
            found, tried = tried, tried - step
        else:
            missed, tried = tried, tried + step
        if missed > 0 and found < round(1 / _RESOLUTION):
            break
        step *= 4
    while found - missed > 1:
        middle = (missed + found) // 2
        missed, found = (missed, middle) if is_found(middle * _RESOLUTION) else (middle, found)
    return round(found * _RESOLUTION, 4)


def _counts(treatment_only: ArrayLike, control_only: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    b, c = np.asarray(treatment_only, dtype=np.float64), np.asarray(control_only, dtype=np.float64)
    if not ((b >= 0).all() and (c >= 0).all()):
        raise ValueError("counts must be zero or more")
    return b, c


@lru_cache(maxsize=16)
def _critical_counts(level: float, most: int) -> NDArray[np.int64]:
    """For 0, 1, ... `most` discordant images, how many on one side make p <= level; one too many where none do."""
    k = np.arange(most + 1)
    z = -float(ndtri(level / 2))
    needed = np.clip(np.ceil(k / 2 + z * np.sqrt(k) / 2).astype(np.int64), 0, k + 1)
    # The normal approximation is a few counts off; the exact tails put it right.
    while (is_short := (needed <= k) & (2 * _upper_tail(needed, k, 0.5) > level)).any():
        needed += is_short
    while (is_long := (needed > 0) & (2 * _upper_tail(needed - 1, k, 0.5) <= level)).any():
        needed -= is_long
    return needed


def _upper_tail(needed: NDArray[np.int64], k: NDArray[np.int64], share: float) -> NDArray[np.float64]:
    """P(X >= needed) for X binomial of k trials."""
    # At needed = 0 the tail is everything, at needed > k nothing: outside what bdtrc answers.
    inside = bdtrc(np.clip(needed - 1, 0, k), k, share)
    return np.where(needed <= 0, 1.0, np.where(needed > k, 0.0, inside))
