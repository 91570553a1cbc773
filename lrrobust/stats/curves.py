"""Area under a robustness curve, and its uncertainty over images."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

#: Bootstrap draws are made in batches of about this many numbers, which bounds their memory.
_BATCH_NUMBERS = 2_000_000


def log_area_weights(eps: ArrayLike) -> NDArray[np.float64]:
    """Weights whose sum with robust accuracies is the area under their curve over log eps, divided by its length.

    Trapezoids. Ladders of eps are geometric: over eps itself the largest step, at which naturally trained networks
    are broken anyway, would be half of the area, over log eps every doubling counts the same. The area is the mean
    robust accuracy over the ladder, and hence depends on the ladder: only areas over one ladder are comparable.

    Args:
        eps: at least two, positive, finite, ascending.

    Returns:
        One weight for each eps, of sum 1.

    Raises:
        ValueError: the ladder is not such.

    >>> log_area_weights([1, 2, 4]).tolist()
    [0.25, 0.5, 0.25]
    """
    eps = np.asarray(eps, dtype=np.float64)
    if eps.ndim != 1 or len(eps) < 2 or not (np.isfinite(eps) & (eps > 0)).all() or not (np.diff(eps) > 0).all():
        raise ValueError("expected a ladder of at least two eps, positive, finite and ascending")
    lengths = np.diff(np.log(eps))
    return (np.append(lengths, 0) + np.append(0, lengths)) / (2 * lengths.sum())


def bootstrap_mean_interval(
    values: ArrayLike, confidence: float = 0.95, *, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of a mean, by drawing as many values with replacement.

    Pairs stay together when `values` are differences image by image. Draws how often each distinct value appears
    (multinomial) rather than the values themselves: the same distribution, at a cost that does not grow with n when
    values repeat.

    Args:
        values: (n,), at least one.
        confidence: between 0 and 1, both excluded.
        resamples: draws.
        seed: of the draws.

    Returns:
        low and high.

    Raises:
        ValueError: there are no values.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, section 13.3.

    >>> low, high = bootstrap_mean_interval([0.0] * 50 + [1.0] * 50)
    >>> print(f"{low:.2f} {high:.2f}")
    0.40 0.60
    """
    distinct, counts = np.unique(np.asarray(values, dtype=np.float64), return_counts=True)
    n = int(counts.sum())
    if n == 0:
        raise ValueError("expected at least one value")
    generator = np.random.default_rng(seed)
    batch = max(1, _BATCH_NUMBERS // len(distinct))
    means = np.concatenate(
        [
            generator.multinomial(n, counts / n, size=min(batch, resamples - start)) @ distinct / n
            for start in range(0, resamples, batch)
        ]
    )
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
