"""When is a count too large to be chance?

A false alarm withholds an honest verdict, so checks of what attacks break fail by an exact test and not by a bare
comparison. Only at a budget that holds plain grey is a single image left standing one too many.
"""

from __future__ import annotations

from collections.abc import Sequence

from lrrobust.stats import binomial_p_value, mcnemar_p_value

#: Probability of a false alarm of one check of a sound attack on a sound model, at most.
SIGNIFICANCE = 0.01

#: Share of images on which an attack may fall short before it counts as failed: 2 points of robust accuracy,
#: less than the intervals of any evaluation of 1000 images or fewer.
TOLERATED_SHARE = 0.02


def is_tolerable(count: int, n: int, share: float = TOLERATED_SHARE, looks: int = 1) -> bool | None:
    """Whether `count` of `n` images agree with a true share of at most `share`; None when any count of so few would.

    Args:
        looks: how many such counts this is the largest of (Bonferroni).
    """
    if share**n * looks > SIGNIFICANCE:
        return None
    return binomial_p_value(count, n, share) * looks > SIGNIFICANCE


def is_never_beaten(weaker_only: Sequence[int], stronger_only: Sequence[int]) -> bool:
    """Whether a weaker attack breaks no more than a stronger one, at any of some budgets.

    Args:
        weaker_only, stronger_only: images that only one of them breaks, at each budget, on the same images.
    """
    p_values = mcnemar_p_value(weaker_only, stronger_only, "greater")
    return bool((p_values * len(weaker_only) > SIGNIFICANCE).all())
