"""The classes that targeted attacks drive images towards."""

from __future__ import annotations

import torch
from torch import nn

from lrrobust.attacks.losses import likely_targets


def choose_targets(
    model: nn.Module, images: torch.Tensor, labels: torch.Tensor, levels: torch.Tensor, count: int, batch_size: int
) -> torch.Tensor:
    """For each image that is attacked the classes that the model holds likeliest beside its label, likeliest first.

    Takes one forward pass of each of these images.

    Args:
        levels: (N,), zero where an image is not attacked.
        count: classes; K - 1 at most are taken.
        batch_size: images passed through the model at once.

    Returns:
        int64 (N, min(count, K - 1)); nothing of use for images that are not attacked.
    """
    rows = levels.nonzero().flatten().to(images.device)
    if not len(rows):
        return labels[:, None]
    with torch.no_grad():
        parts = [likely_targets(model(images[part]), labels[part], count) for part in rows.split(batch_size)]
    likely = torch.cat(parts)
    return labels[:, None].repeat(1, likely.shape[1]).index_copy(0, rows, likely)
