"""Steps, projections and starts in the ball of a norm and the box [0, 1]; images (n, C, H, W), each on its own."""

from __future__ import annotations

import torch

from lrrobust.threat import Norm


def unit(gradient: torch.Tensor, norm: Norm) -> torch.Tensor:
    """The steepest direction of length 1 in the norm; zero where the gradient is."""
    if norm == "linf":
        return gradient.sign()
    # In float64, where squares of small numbers are no zeros.
    length = torch.linalg.vector_norm(gradient, dim=(1, 2, 3), keepdim=True, dtype=torch.float64)
    return (gradient / length.clamp_min(torch.finfo(torch.float64).tiny)).to(gradient)


def project(images: torch.Tensor, moved: torch.Tensor, eps: torch.Tensor, norm: Norm) -> torch.Tensor:
    """Back into the ball of radius eps (n, 1, 1, 1), then into the box, which lengthens no perturbation."""
    delta = moved - images
    if norm == "linf":
        delta = torch.minimum(torch.maximum(delta, -eps), eps)
    else:
        length = torch.linalg.vector_norm(delta, dim=(1, 2, 3), keepdim=True)
        delta = delta * (eps / length.clamp_min(torch.finfo(delta.dtype).tiny)).clamp_max(1)
    return (images + delta).clamp(0, 1)


def surface_start(image: torch.Tensor, norm: Norm, eps: float, generator: torch.Generator) -> torch.Tensor:
    """A random image (C, H, W) at distance eps, before the box cuts it. Drawn on the CPU in float32."""
    if norm == "linf":
        noise = 2 * torch.rand(image.shape, generator=generator) - 1
        noise = noise / noise.abs().max()
    else:
        noise = torch.randn(image.shape, generator=generator)
        noise = noise / noise.norm()
    return (image + eps * noise.to(image)).clamp(0, 1)
