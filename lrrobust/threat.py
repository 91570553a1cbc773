"""What an attacker may do: a norm, a budget, and the check that an image keeps to both."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from lrrobust.norm import NORMS, Norm

#: Order of each norm.
_ORDERS: dict[Norm, float] = {"linf": math.inf, "l2": 2, "l1": 1}

#: Slack of the ball and box checks, in pixel units of [0, 1]. Attacks compute in float32 and overshoot
#: their budget by about 3e-8 (linf) and 1e-7 (l2); a change of 1e-6 is 1/3900 of an 8-bit grey level.
TOLERANCE = 1e-6

#: The same in l1, where the rounding of every pixel adds up: as a share of the budget, on top of it.
L1_TOLERANCE = 1e-6


@dataclass(frozen=True)
class ThreatModel:
    """All images in [0, 1] within distance `eps` of the clean image.

    Args:
        norm: "linf", "l2" or "l1", over all pixels and colours of an image.
        eps: radius in pixel units of [0, 1], zero or more, one for all images or one for each (N,);
            infinity leaves only the box.
    """

    norm: Norm
    eps: float | torch.Tensor

    def __post_init__(self) -> None:
        if self.norm not in NORMS:
            raise ValueError(f"norm must be one of {', '.join(NORMS)}, got {self.norm!r}")
        if not torch.as_tensor(self.eps >= 0).all():
            raise ValueError(f"eps must be zero or more, got {self.eps!r}")

    def is_in_ball(self, images: torch.Tensor, adversarial: torch.Tensor) -> torch.Tensor:
        """Which of `adversarial` (N, C, H, W) lie within `eps` of `images`; bool (N,). NaN is outside."""
        slack = TOLERANCE + (L1_TOLERANCE * self.eps if self.norm == "l1" else 0)
        return distance(images, adversarial, self.norm) <= self.eps + slack


def distance(images: torch.Tensor, adversarial: torch.Tensor, norm: Norm) -> torch.Tensor:
    """Distance of each image pair in pixel units, computed in float64; (N, C, H, W) twice -> (N,)."""
    delta = (adversarial.double() - images.double()).flatten(1)
    return torch.linalg.vector_norm(delta, _ORDERS[norm], dim=1)


def box_diameter(norm: Norm, pixels: int) -> float:
    """The distance from a black image to a white one of so many values."""
    return float(pixels ** (1 / _ORDERS[norm]))


def is_in_box(images: torch.Tensor) -> torch.Tensor:
    """Which images (N, C, H, W) are finite and lie in [0, 1] up to the tolerance; bool (N,)."""
    flat = images.flatten(1)
    return ((flat >= -TOLERANCE) & (flat <= 1 + TOLERANCE)).all(1)
