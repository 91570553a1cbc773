"""What attacks share that know no budget, but look for the nearest adversarial image of each image."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from lrrobust.attacks.assignment import Assignment, Claim, Passes
from lrrobust.attacks.climb import Search, climb, is_clearly_misclassified, rounding
from lrrobust.attacks.losses import margin
from lrrobust.threat import Norm, distance

#: How far beyond what it found an attack proposes once more where the judge did not agree: a share of the distance.
_RETREAT = 0.01


def find_nearest(
    given: Assignment,
    *,
    norm: Norm,
    starts: int,
    steps: int,
    line_search_steps: int,
    enough: float,
    search: Search,
) -> Passes:
    """Take every image through all starts, and propose the nearest adversarial image met on the way.

    Nothing is claimed on the way: an image that is broken goes on, as a nearer one may be found. The nearest is
    drawn towards the clean image at the end, along the line between them. A nearest adversarial image lies at the
    very boundary, where it depends on the last bits of the logits who is right; where the judge does not agree, one
    that is a little farther away is proposed as well.

    Args:
        given: the images, and who judges what is proposed at last, the clean image where nothing was found. The one budget
            is infinity.
        norm: what is near.
        starts, steps, search: see `lrrobust.attacks.climb.climb`. What a search calls wrong must be so clearly, see
            `climb.is_clearly_misclassified`.
        line_search_steps: of the search along the line; 0 for none.
        enough: an image is done as soon as its distance is no larger; 0 for the nearest that all steps find, infinity
            for the first.

    Returns:
        Steps of the search, and forward passes of the line search, two and one each a step, each int64 (1, N) on the CPU.
    """
    images = given.images
    nearest = images.clone()
    shortest = torch.full((len(images),), math.inf, dtype=torch.float64, device=images.device)

    def note(rows: Sequence[int], proposals: torch.Tensor, eps: Sequence[float], is_last: Sequence[bool]) -> list[bool]:
        """What `climb` asks; who is done leaves, as if broken."""
        at = torch.tensor(rows, device=images.device)
        if not is_last[0]:  # what is last proposed has not been seen by the model
            length = distance(images[at], proposals, norm)
            is_nearer = length < shortest[at]
            nearest[at[is_nearer]] = proposals[is_nearer].detach()
            shortest[at[is_nearer]] = length[is_nearer]
        return (shortest[at] <= enough).tolist()

    taken = climb(replace(given, ladder=(math.inf,), claim=note), starts=starts, steps=steps, search=search)
    looked = torch.zeros_like(taken)
    attacked = given.levels.nonzero().flatten()
    for rows in attacked.split(given.batch_size) if len(attacked) else ():
        at = rows.to(images.device)
        found = shortest[at].isfinite() & (shortest[at] > enough)
        if line_search_steps and found.any():
            drawn = at[found]
            nearest[drawn] = _draw_nearer(given.model, images[drawn], nearest[drawn], given.labels[drawn], line_search_steps)
            looked[0, rows[found.cpu()]] = 2 + line_search_steps
        _propose(given.claim, rows, images[at], nearest[at])
    return taken, looked


def _draw_nearer(
    model: Callable[[torch.Tensor], torch.Tensor],
    images: torch.Tensor,
    adversarial: torch.Tensor,
    labels: torch.Tensor,
    steps: int,
) -> torch.Tensor:
    """The nearest adversarial image that false position meets on the line from images to adversarial, (n, C, H, W)."""

    def lead(proposals: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """By how much another class leads, beyond what is clear; and whether it does."""
        with torch.no_grad():
            logits = model(proposals)
        return margin(logits, labels) - 2 * rounding(logits), is_clearly_misclassified(logits, labels)

    near, far = images.new_tensor([[0.0], [1.0]], dtype=torch.float64).repeat(1, len(images))
    (lead_near, _), (lead_far, _) = lead(images), lead(adversarial)
    nearest = adversarial
    for _ in range(steps):
        slope = (lead_far - lead_near).clamp_min(torch.finfo(torch.float64).tiny)
        share = near + (far - near) * (-lead_near / slope).clamp(0, 1)
        between = images + share[:, None, None, None].to(images) * (adversarial - images)
        found, is_wrong = lead(between)
        nearest = torch.where(is_wrong[:, None, None, None], between, nearest)
        far, lead_far = torch.where(is_wrong, share, far), torch.where(is_wrong, found, lead_far)
        near, lead_near = torch.where(is_wrong, near, share), torch.where(is_wrong, lead_near, found)
    return nearest


def _propose(claim: Claim, rows: torch.Tensor, images: torch.Tensor, nearest: torch.Tensor) -> None:
    def propose(places: torch.Tensor, proposals: torch.Tensor) -> torch.Tensor:
        """Which places are not broken by now."""
        proposed = proposals[places.to(images.device)].contiguous()
        is_broken = claim(rows[places].tolist(), proposed, [math.inf] * len(places), [True] * len(places))
        return places[~torch.tensor(is_broken)]

    standing = propose(torch.arange(len(rows)), nearest)
    is_found = (nearest != images).flatten(1).any(1).cpu()
    if len(standing := standing[is_found[standing]]):
        propose(standing, (images + (1 + _RETREAT) * (nearest - images)).clamp(0, 1))
