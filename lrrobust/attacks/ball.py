"""Steps, projections and starts in the ball of a norm and the box [0, 1]; images (n, C, H, W), each on its own."""

from __future__ import annotations

import math

import torch

from lrrobust.attacks.piecewise_linear import find_crossing
from lrrobust.threat import Norm


def l2_length(values: torch.Tensor, dim: tuple[int, ...] = (1, 2, 3)) -> torch.Tensor:
    """Euclidean lengths over `dim`, which is kept; float64.

    Sums of squares in float32 lose the sixth digit on images of 100 pixels a side and more: what they put on the surface
    of the ball would lie outside by more than the judge lets pass. And squares of small numbers would be zeros.
    """
    return torch.linalg.vector_norm(values, dim=dim, keepdim=True, dtype=torch.float64)


def unit(gradient: torch.Tensor, norm: Norm) -> torch.Tensor:
    """The steepest direction of length 1 in linf or l2; zero where the gradient is. For l1 see `sparse_unit`."""
    if norm == "linf":
        return gradient.sign()
    return (gradient / l2_length(gradient).clamp_min(torch.finfo(torch.float64).tiny)).to(gradient)


def inside_box(gradient: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """The gradient, zero for values at an end of the box that it points out of: there is no step that way."""
    return gradient.where(torch.where(gradient > 0, images < 1, images > 0), 0)


def sparse_unit(gradient: torch.Tensor, images: torch.Tensor, share: float) -> torch.Tensor:
    """A steep direction of length 1 in l1, which changes a share of the values alike; zero where the gradient is.

    The steepest changes a single value, and a search would take thousands of steps. Values that the box keeps from
    going the way of their gradient are passed over: they would waste the step.

    Args:
        images: where the gradient was taken, (n, C, H, W) in [0, 1].
        share: of the values, more than 0 and at most 1; one value changes at least.

    Source: Tramer and Boneh, Adversarial Training and Robustness for Multiple Perturbations, 2019, section 2.2
    (sparse l1 descent).
    """
    sign = gradient.sign()
    steepness = inside_box(gradient, images).abs().flatten(1)
    steepest = steepness.topk(math.ceil(share * steepness.shape[1]), dim=1)
    chosen = torch.zeros_like(steepness).scatter(1, steepest.indices, (steepest.values > 0).to(steepness))
    chosen = chosen / chosen.sum(1, keepdim=True).clamp_min(1)
    return sign * chosen.view_as(sign)


def largest_signs(gradient: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """The signs of the largest values, as many as `counts` (n,) says, divided to length 1 in l1; zero where it is.

    All that tie are taken, so that no image depends on others of the batch. Values at an end of the box are not passed
    over: the projection would take back what they have.
    """
    steepness = gradient.abs().flatten(1)
    least = steepness.topk(int(counts.max()), dim=1).values.gather(1, counts[:, None] - 1)
    chosen = ((steepness >= least) & (steepness > 0)).to(steepness)
    return gradient.sign() * (chosen / chosen.sum(1, keepdim=True).clamp_min(1)).view_as(gradient)


def dual_length(gradient: torch.Tensor, norm: Norm) -> torch.Tensor:
    """What a step of length 1 in the norm gains at most in the linear model; float64 (n,)."""
    order = {"linf": 1, "l2": 2, "l1": math.inf}[norm]
    return torch.linalg.vector_norm(gradient.flatten(1), order, dim=1, dtype=torch.float64)


def project(images: torch.Tensor, moved: torch.Tensor, eps: torch.Tensor, norm: Norm) -> torch.Tensor:
    """Back into ball and box: the ball of radius eps (n, 1, 1, 1), then the box, which lengthens no perturbation.

    In l1 onto what ball and box have in common, at once: the box cuts off most of a perturbation that is large in few
    values, and budget would be lost.
    """
    delta = moved - images
    if norm == "l1":
        return _project_l1(images, delta, eps)
    if norm == "l2":
        return _project_l2(images, delta, eps).clamp(0, 1)
    return (images + torch.minimum(torch.maximum(delta, -eps), eps)).clamp(0, 1)


def _project_l2(images: torch.Tensor, delta: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
    """Shortened to the surface of the ball; computed in float64, and never outside by more than rounding in float64."""
    budget = eps.double()
    length = l2_length(delta)
    # A large eps was rounded to float32 itself, by more than the judge lets pass.
    inner = budget * (1 - torch.finfo(torch.float32).eps)
    delta = delta * (inner / length.clamp_min(torch.finfo(torch.float64).tiny)).clamp_max(1)
    projected = (images + delta).to(images)
    is_outside = l2_length(projected.double() - images) > budget
    # Rarely so, and on a GPU asking takes longer than rounding.
    if is_outside.is_cuda or is_outside.any():
        projected = torch.where(is_outside, _rounded_inwards(projected, images, delta.abs()), projected)
    return projected


def _rounded_inwards(projected: torch.Tensor, images: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Values whose rounding made their perturbation longer than `lengths` (float64), one step back to the image."""
    is_longer = (projected.double() - images).abs() > lengths
    return torch.where(is_longer, projected.nextafter(images), projected)


def _project_l1(images: torch.Tensor, delta: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
    """Every value gives up the same length, but for those that the box has cut by more; computed in float64.

    Source: Croce and Hein, Mind the box: l1-APGD for sparse adversarial attacks on image classifiers, 2021, section 2.
    """
    shape, points = images.shape, images.flatten(1).double()
    delta, budget = delta.flatten(1).double(), eps.view(-1).double()
    room = torch.where(delta > 0, 1 - points, points)
    length = delta.abs()
    kept = torch.minimum(length, room)
    is_long = kept.sum(1) > budget
    if is_long.any():
        # What is given up falls from the longest value to 0; t is its negative, each value has a share from its length on.
        first, last = -length[is_long], room[is_long] - length[is_long]
        changes = torch.ones_like(first)
        given_up = -find_crossing(torch.cat([first, last], 1), torch.cat([changes, -changes], 1), budget[is_long])
        kept[is_long] = (length[is_long] - given_up[:, None]).clamp_min(0).minimum(room[is_long])
    # Rounding every value to the nearest number adds up to more than the tolerance.
    projected = (points + kept * delta.sign()).to(images.dtype).view(shape)
    return _rounded_inwards(projected, images, kept.view(shape))


def l1_direction(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """A uniform direction of length 1 in l1. Drawn on the CPU in float32."""
    lengths = torch.empty(shape).exponential_(generator=generator)
    return lengths * (2.0 * torch.randint(2, shape, generator=generator) - 1) / lengths.sum()


def surface_start(image: torch.Tensor, norm: Norm, eps: float, generator: torch.Generator) -> torch.Tensor:
    """A random image (C, H, W) at distance eps in linf or l2, before the box cuts it. Drawn on the CPU in float32."""
    if norm == "linf":
        noise = 2 * torch.rand(image.shape, generator=generator) - 1
        noise = noise / noise.abs().max()
    else:
        noise = torch.randn(image.shape, generator=generator)
        noise = noise / l2_length(noise, (0, 1, 2)).to(noise)
    return (image + eps * noise.to(image)).clamp(0, 1)
