"""Numbers that summarise verdicts: arrays in, numbers out."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import ndtri


def wilson_interval(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Interval for the proportion behind `successes` of `n` independent trials.

    With p = successes / n and z the two-sided normal quantile:
    (p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n). Unlike p -+ z sqrt(p(1-p)/n) it stays
    in [0, 1] and keeps a width at p = 0 and 1.

    Args:
        successes: 0 to n.
        n: number of trials; without any, nothing is known and the interval is (0, 1).
        confidence: between 0 and 1, both excluded.

    Returns:
        low and high, as fractions.

    Raises:
        ValueError: an argument is out of its range.

    Source: Wilson, Probable inference, the law of succession, and statistical inference, JASA 22, 1927.

    >>> low, high = wilson_interval(500, 1000)
    >>> print(f"{low:.3f} {high:.3f}")
    0.469 0.531
    >>> wilson_interval(0, 0)
    (0.0, 1.0)
    """
    if not 0 <= successes <= n:
        raise ValueError(f"expected 0 <= successes <= n, got {successes=}, {n=}")
    if not 0 < confidence < 1:
        raise ValueError(f"expected 0 < confidence < 1, got {confidence=}")
    if n == 0:
        return 0.0, 1.0
    z = float(ndtri((1 + confidence) / 2))
    share = successes / n
    centre = share + z * z / (2 * n)
    spread = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    # Exact at the ends, where rounding would leave 1e-17 instead of 0.
    low = 0.0 if successes == 0 else (centre - spread) / scale
    high = 1.0 if successes == n else (centre + spread) / scale
    return low, high


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
