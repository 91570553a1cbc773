"""One proportion and its interval."""

from __future__ import annotations

import math

from scipy.special import bdtrc, ndtri


def wilson_interval(successes: float, n: float, confidence: float = 0.95) -> tuple[float, float]:
    """Interval for the proportion behind `successes` of `n` independent trials.

    With p = successes / n and z the two-sided normal quantile:
    (p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n). Unlike p -+ z sqrt(p(1-p)/n) it stays
    in [0, 1] and keeps a width at p = 0 and 1.

    Args:
        successes: 0 to n; no whole number where images weigh differently.
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


def binomial_p_value(successes: int, n: int, share: float) -> float:
    """Exact one-sided test that the proportion is at most `share`: probability of at least as many successes.

    Args:
        successes: 0 to n.
        n: number of trials.
        share: between 0 and 1, both excluded.

    Raises:
        ValueError: an argument is out of its range.

    >>> f"{binomial_p_value(5, 64, 0.02):.4f}"
    '0.0092'
    """
    if not 0 <= successes <= n:
        raise ValueError(f"expected 0 <= successes <= n, got {successes=}, {n=}")
    if not 0 < share < 1:
        raise ValueError(f"expected 0 < share < 1, got {share=}")
    return 1.0 if successes == 0 else float(bdtrc(successes - 1, n, share))
