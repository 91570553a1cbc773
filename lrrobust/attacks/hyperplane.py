"""The shortest way from an image to a hyperplane that does not leave the box [0, 1]."""

from __future__ import annotations

import torch

from lrrobust.attacks.piecewise_linear import find_crossing
from lrrobust.norm import LinfOrL2


def way_to_hyperplane(images: torch.Tensor, normals: torch.Tensor, rises: torch.Tensor, norm: LinfOrL2) -> torch.Tensor:
    """The shortest d with <normal, d> = rise and images + d in [0, 1], for each image.

    Values that reach the end of the box stop there and the others go on, so the way is exact, not a projection that
    the box cuts afterwards. Where the hyperplane does not meet the box, the way leads to the point nearest to it, and
    nowhere where the normal is zero. Computed in float64.

    Args:
        images: (n, C, H, W) in [0, 1].
        normals: of the same shape, finite.
        rises: (n,).

    Returns:
        d (n, C, H, W), in the type of the images.

    Source: Croce and Hein, Minimally distorted Adversarial Attacks with a Fast Adaptive Boundary Attack, 2020,
    section 2.2; Hein and Andriushchenko, Formal Guarantees on the Robustness of a Classifier against Adversarial
    Manipulation, 2017, section 4.
    """
    # Any factor of both leaves the hyperplane where it is; this one keeps squares in range.
    scale = normals.flatten(1).double().abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    normal, rise = normals.flatten(1).double() / scale, rises.double() / scale.squeeze(1)
    towards = normal.sign() * rise.sign()[:, None]
    points = images.flatten(1).double()
    weights = normal.abs()
    room = torch.where(towards > 0, 1 - points, points).where(towards != 0, 0)
    # At length t every value has moved by min(t * speed, room), which has gained weight times that.
    speed = torch.ones_like(weights) if norm == "linf" else weights
    stops, gains = room / speed.where(towards != 0, 1), weights * speed
    knots = torch.cat([torch.zeros_like(stops[:, :1]), stops], 1)
    changes = torch.cat([gains.sum(1, keepdim=True), -gains], 1)
    # From inside the box the whole of it can be crossed in so long; infinity times a speed of 0 is no number.
    length = find_crossing(knots, changes, rise.abs()).minimum(stops.amax(1))
    return (towards * torch.minimum(length[:, None] * speed, room)).to(images).view_as(images)
