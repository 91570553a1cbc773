"""Random perturbations that fill a ball."""

from __future__ import annotations

import math

import torch

from lrrobust.attacks.ball import l1_direction, l2_length
from lrrobust.threat import Norm


def draw_noise(norm: Norm, eps: float, shape: torch.Size, generator: torch.Generator, *, is_corner: bool) -> torch.Tensor:
    """A perturbation of one image, of length at most eps in the norm.

    Args:
        is_corner: every value +-`inner_radius`; else linf: uniform in the ball, l2: a uniform direction at full length,
            l1: Laplace noise at full length.
    """
    if is_corner:
        signs = 2.0 * torch.randint(2, shape, generator=generator) - 1
        return signs * inner_radius(norm, eps, shape.numel())
    if norm == "linf":
        return (2 * torch.rand(shape, generator=generator) - 1) * eps
    if norm == "l2":
        direction = torch.randn(shape, generator=generator)
        return direction * (eps / l2_length(direction, (0, 1, 2))).to(direction)
    return l1_direction(shape, generator) * eps


def inner_radius(norm: Norm, eps: float, pixels: int) -> float:
    """Half the side of the largest cube, with sides along the axes, in a ball of radius eps."""
    return {"linf": eps, "l2": eps / math.sqrt(pixels), "l1": eps / pixels}[norm]
