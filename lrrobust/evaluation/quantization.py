"""Adversarial images as a file holds them: 8 bits for each value."""

from __future__ import annotations

import torch

from lrrobust.threat import TOLERANCE, ThreatModel

#: Share of the ball's tolerance that is used up here, so that rounding in the judge's own measure does no harm.
_SLACK = 0.5 * TOLERANCE


def quantize(images: torch.Tensor, adversarial: torch.Tensor, threat: ThreatModel) -> torch.Tensor:
    """Rounds adversarial images to multiples of 1/255 inside box and ball.

    linf: every value to the nearest multiple that lies within eps of the clean value. l2 and l1: every value to the
    nearest multiple; where that leaves the ball, some of the values that rounding moved away from the clean image go to
    the next multiple towards it instead, those first that shorten the perturbation most for what they deviate. With all
    of them undone the perturbation is nowhere longer than it was, so the result lies in the ball when the clean image
    consists of multiples of 1/255, as images read from files do, and the adversarial one lies in it. Other results may
    lie outside; whether they do, and whether they still fool a model, is for the judge to say.

    Args:
        images: clean, (N, C, H, W) in [0, 1].
        adversarial: of the same shape, finite.
        threat: norm and budget, one for all or one for each image.

    Returns:
        float32 (N, C, H, W): exactly the values that an 8-bit file has once it is read again, k / 255.
    """
    clean, found = (255 * pixels.double().flatten(1) for pixels in (images, adversarial))
    budget = 255 * (torch.as_tensor(threat.eps, dtype=torch.float64, device=images.device).reshape(-1, 1) + _SLACK)
    levels = found.round().clamp(0, 255)
    if threat.norm == "linf":
        levels = levels.maximum((clean - budget).ceil()).minimum((clean + budget).floor())
    else:
        levels = _shorten(clean, found, levels, budget, 1 if threat.norm == "l1" else 2)
    return (levels.to(torch.float32) / 255).view(images.shape)


def _shorten(clean: torch.Tensor, found: torch.Tensor, levels: torch.Tensor, budget: torch.Tensor, order: int) -> torch.Tensor:
    """Undoes as many roundings as it takes to come within the budget; all (N, D), in grey levels."""
    length = (levels - clean).abs()
    nearer = levels - (levels - clean).sign()
    saved = length**order - (nearer - clean).abs() ** order
    is_undoable = (length > (found - clean).abs()) & (saved > 0)
    deviation = (nearer - found).abs() - (levels - found).abs()
    ranking = torch.where(is_undoable, deviation / saved.clamp_min(1e-9), torch.inf).argsort(dim=1, stable=True)
    saved = saved.where(is_undoable, 0).gather(1, ranking)
    excess = (length**order).sum(1, keepdim=True) - budget**order
    # Those before were not enough: this one is undone as well.
    is_undone = torch.zeros_like(is_undoable).scatter(1, ranking, saved.cumsum(1) - saved < excess)
    return torch.where(is_undone & is_undoable, nearer, levels)
