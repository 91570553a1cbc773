"""What an attack spent on each image, counted in passes through the network."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray


def passes_up_to(images: ArrayLike, eps: ArrayLike, passes: ArrayLike) -> NDArray[np.float64]:
    """Passes that one attack had spent on the image of each row when it was done with the row's eps.

    Budgets are attacked from the smallest on, and what is broken at one is not attacked at larger ones: the passes at
    all smaller eps belong to the price of a verdict. An attack that searches the nearest adversarial image, told by
    its row at infinity, searches once: the whole search is the price of each of its verdicts.

    Args:
        images: (n,) which image a row is of.
        eps: (n,) different ones for the rows of an image; infinity for a search without budget.
        passes: (n,) spent at that eps, NaN where not counted.

    Returns:
        (n,), NaN from the first on that was not counted.

    >>> passes_up_to([7, 7, 8, 8], [1, 2, 1, 2], [20, 3, 5, 0]).tolist()
    [20.0, 23.0, 5.0, 5.0]
    >>> passes_up_to([7, 7], [1, np.inf], [0, 500]).tolist()
    [500.0, 500.0]
    """
    _, images = np.unique(np.asarray(images), return_inverse=True)
    eps, passes = np.asarray(eps, dtype=np.float64), np.asarray(passes, dtype=np.float64)
    if not len(images):
        return passes
    if np.isinf(eps).any():
        return np.bincount(images, weights=passes)[images]
    order = np.lexsort((eps, images))
    ordered = images[order]
    first = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1]))
    # Running sums over all rows, less what they were where the row's image began; unknown ones are counted apart, as a
    # NaN of one image would reach all that follow.
    is_unknown = np.isnan(passes[order])
    sums = np.cumsum([np.where(is_unknown, 0.0, passes[order]), is_unknown], axis=1)
    before = (sums - [np.where(is_unknown, 0.0, passes[order]), is_unknown])[:, first][:, ordered]
    spent, unknown = sums - before
    result = np.empty_like(spent)
    result[order] = np.where(unknown > 0, np.nan, spent)
    return result


def curve_over_passes(
    passes: ArrayLike, is_clean_correct: ArrayLike, is_broken: ArrayLike
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Robust accuracy after at most so many passes on each image: a step function, and where the attack stopped.

    Args:
        passes: (n,) spent on each image, at least one image; see `passes_up_to`.
        is_clean_correct, is_broken: (n,) bool; images wrong when clean count as broken without a pass.

    Returns:
        passes, ascending from 0, and the share of images that are not broken by then; the last passes are the most
        that any image took.

    >>> for curve in curve_over_passes([10, 40, 40, 0], [True, True, True, False], [True, False, True, True]):
    ...     print(curve.tolist())
    [0.0, 10.0, 40.0]
    [0.75, 0.5, 0.25]
    """
    passes = np.asarray(passes, dtype=np.float64)
    broken_after = np.where(np.asarray(is_clean_correct), np.where(np.asarray(is_broken), passes, np.inf), 0.0)
    steps = np.unique(np.append(broken_after[np.isfinite(broken_after)], [0.0, passes.max()]))
    return steps, 1 - np.searchsorted(np.sort(broken_after), steps, side="right") / len(broken_after)
