"""The classes that targeted attacks drive images towards."""

from __future__ import annotations

import math
from typing import Literal

import torch

from lrrobust.attacks.assignment import Assignment
from lrrobust.attacks.losses import likely_targets
from lrrobust.errors import ConfigError

#: Which class an image is driven towards:
#: none           none, only away from its own;
#: random         any other than its label, drawn for every start;
#: least_likely   the one the model holds least likely when the image is clean;
#: top_k          the k likeliest other than its label, one after the other;
#: a number       that class; images of that very class go to the likeliest other one.
Target = Literal["none", "random", "least_likely", "top_k"] | int


def choose_targets(given: Assignment, target: Target, count: int) -> torch.Tensor:
    """For each image that is attacked the classes to drive it to; takes one forward pass of each.

    Args:
        given: the images; those whose level is zero are not attacked.
        target: not "none".
        count: of "top_k", K - 1 at most are taken.

    Returns:
        int64 (N, T), nothing of use for images that are not attacked: the `count` likeliest classes, likeliest first,
        for "top_k"; all classes that may be drawn for "random"; else one.

    Raises:
        ConfigError: the model has no class of that number.
    """
    model, images, labels = given.model, given.images, given.labels
    rows = given.levels.nonzero().flatten().to(images.device)
    if not len(rows):
        return labels[:, None]
    with torch.no_grad():
        parts = [_targets(model(images[part]), labels[part], target, count) for part in rows.split(given.batch_size)]
    chosen = torch.cat(parts)
    return labels[:, None].repeat(1, chosen.shape[1]).index_copy(0, rows, chosen)


def _targets(logits: torch.Tensor, labels: torch.Tensor, target: Target, count: int) -> torch.Tensor:
    if target == "least_likely":
        return logits.scatter(1, labels[:, None], math.inf).argmin(1, keepdim=True)
    if isinstance(target, int):
        if target >= logits.shape[1]:
            raise ConfigError(f"target: expected a class from 0 to {logits.shape[1] - 1}, those of the model, found {target}")
        return torch.where(labels[:, None] == target, likely_targets(logits, labels, 1), target)
    return likely_targets(logits, labels, count if target == "top_k" else logits.shape[1])


def with_the_choice(passes: torch.Tensor) -> torch.Tensor:
    """Adds the forward pass that choosing targets takes, at the first budget of each image; int64 (L, N)."""
    first = (passes > 0).int().argmax(0)
    attacked = (passes > 0).any(0).nonzero().flatten()
    with_it = passes.clone()
    with_it[first[attacked], attacked] += 1
    return with_it
