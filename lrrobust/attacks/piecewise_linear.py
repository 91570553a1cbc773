"""Where sums of hinges reach a value: what projections onto balls and planes, cut by the box, come down to."""

from __future__ import annotations

import torch


def find_crossing(knots: torch.Tensor, changes: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """The smallest t at which f(t) = sum_j changes_j * max(t - knots_j, 0) reaches the wanted value, for each row.

    f must not fall anywhere. No bisection: the pieces of f are sorted, the one that crosses is solved.

    Args:
        knots: (n, m), finite.
        changes: (n, m), by how much the slope rises at each knot.
        wanted: (n,), zero or more.

    Returns:
        (n,): at least the smallest knot; infinity where f stays below.

    >>> knots, changes = torch.tensor([[0.0, 2.0]]).double(), torch.tensor([[1.0, -1.0]]).double()
    >>> [find_crossing(knots, changes, torch.tensor([wanted]).double()).item() for wanted in (0.5, 2.0, 2.5)]
    [0.5, 2.0, inf]
    """
    knots, order = knots.sort(dim=1)
    slopes = changes.gather(1, order).cumsum(1)[:, :-1]
    heights = torch.nn.functional.pad((slopes * knots.diff(dim=1)).cumsum(1), (1, 0))
    # Rounding may leave dips behind the last rise: the highest point tells what is out of reach.
    is_below = heights < wanted[:, None]
    piece = (is_below.long().cumprod(1).sum(1, keepdim=True) - 1).clamp_min(0)
    is_reached = ~is_below.all(1)
    slope = slopes.gather(1, piece.clamp_max(slopes.shape[1] - 1)).squeeze(1)
    rest = (wanted - heights.gather(1, piece).squeeze(1)).clamp_min(0)
    step = torch.where(rest > 0, rest / slope.where(slope > 0, 1), 0)
    return torch.where(is_reached, knots.gather(1, piece).squeeze(1) + step, torch.inf)
