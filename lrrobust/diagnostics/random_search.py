"""A small attack that needs no gradient: squares of extreme colour, kept where they help."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from lrrobust.diagnostics.subject import Subject

#: Side of the squares at the first query and at the last, as shares of the image's.
_LARGEST, _SMALLEST = 0.5, 0.1


def search_at_random(subject: Subject, places: NDArray[np.int64], radius: float, queries: int) -> torch.Tensor:
    """Moves squares of an image to the faces of the cube around it, keeps what lowers the margin.

    The start has vertical stripes of +-radius. Every query repaints one square, in every colour by +radius or by
    -radius; its place and signs are the image's own draw, its side shrinks with the queries. An image is done once it
    is misclassified. A rough form of the attack of Andriushchenko et al., enough to notice masked gradients.

    Args:
        places: which M images of the sample are attacked, at least one.
        radius: half the side of the cube, in pixel units.
        queries: forward passes of each image.

    Returns:
        the best images found, (M, C, H, W), in the cube and in [0, 1].

    Source: Andriushchenko et al., Square Attack, ECCV 2020, sections 3 and 4.
    """
    device = subject.labels.device
    at = torch.from_numpy(places).to(device)
    images, labels, keys = subject.images[at], subject.labels[at], [subject.keys[place] for place in places]
    count, colours, height, width = images.shape
    generators = [subject.generator("random search", key, radius) for key in keys]

    def draw(*shape: int) -> torch.Tensor:
        return torch.stack([torch.rand(shape, generator=generator) for generator in generators])

    def signed(share: torch.Tensor) -> torch.Tensor:
        return torch.where(share < 0.5, -radius, radius).to(images)

    stripes, corners, signs = draw(colours, 1, width), draw(queries, 2).to(device), signed(draw(queries, colours))
    perturbation = signed(stripes).expand_as(images).clone()
    margin = images.new_full((count,), torch.inf, dtype=torch.float64)
    best = images.clone()
    y, x = torch.arange(height, device=device)[:, None], torch.arange(width, device=device)
    left = torch.arange(count, device=device)
    for query in range(queries):
        if not len(left):
            break
        tried = perturbation[left]
        if query > 0:
            side = max(1, round(min(height, width) * _LARGEST * (_SMALLEST / _LARGEST) ** (query / queries)))
            top = (corners[left, query, 0] * (height - side + 1)).long()[:, None, None]
            start = (corners[left, query, 1] * (width - side + 1)).long()[:, None, None]
            is_inside = (y >= top) & (y < top + side) & (x >= start) & (x < start + side)
            tried = torch.where(is_inside[:, None], signs[left, query][:, :, None, None], tried)
        proposed = (images[left] + tried).clamp(0, 1)
        found = subject.judge.predict(proposed, labels[left], [keys[row] for row in left.tolist()])
        is_better = found.margin < margin[left]
        better = left[is_better]
        perturbation[better], best[better], margin[better] = tried[is_better], proposed[is_better], found.margin[is_better]
        left = left[margin[left] >= 0]
    return best
