"""What an attacker may do: a norm, a budget, and the check that an image keeps to both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

Norm = Literal["linf", "l2"]

#: Slack of the ball and box checks, in pixel units of [0, 1]. Attacks compute in float32 and overshoot
#: their budget by about 3e-8 (linf) and 1e-7 (l2); a change of 1e-6 is 1/3900 of an 8-bit grey level.
TOLERANCE = 1e-6


@dataclass(frozen=True)
class ThreatModel:
    """All images in [0, 1] within distance `eps` of the clean image.

    Args:
        norm: "linf" or "l2", over all pixels and colours of an image.
        eps: radius in pixel units of [0, 1], zero or more, one for all images or one for each (N,);
            infinity leaves only the box.
    """

    norm: Norm
    eps: float | torch.Tensor

    def __post_init__(self) -> None:
        if self.norm not in ("linf", "l2"):
            raise ValueError(f"norm must be 'linf' or 'l2', got {self.norm!r}")
        if not torch.as_tensor(self.eps >= 0).all():
            raise ValueError(f"eps must be zero or more, got {self.eps!r}")

    def is_in_ball(self, images: torch.Tensor, adversarial: torch.Tensor) -> torch.Tensor:
        """Which of `adversarial` (N, C, H, W) lie within `eps` of `images`; bool (N,). NaN is outside."""
        return distance(images, adversarial, self.norm) <= self.eps + TOLERANCE


def distance(images: torch.Tensor, adversarial: torch.Tensor, norm: Norm) -> torch.Tensor:
    """Distance of each image pair in pixel units, computed in float64; (N, C, H, W) twice -> (N,)."""
    delta = (adversarial.double() - images.double()).flatten(1)
    return delta.abs().amax(1) if norm == "linf" else torch.linalg.vector_norm(delta, dim=1)


def is_in_box(images: torch.Tensor) -> torch.Tensor:
    """Which images (N, C, H, W) are finite and lie in [0, 1] up to the tolerance; bool (N,)."""
    flat = images.flatten(1)
    return ((flat >= -TOLERANCE) & (flat <= 1 + TOLERANCE)).all(1)
