"""Random crops and flips of whole batches, reproducible from a generator."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

#: Width over height of a random crop lies between these, as in Szegedy et al., CVPR 2015, section 6.
ASPECT_RATIOS = (3 / 4, 4 / 3)


def augment(
    images: torch.Tensor, size: int, *, crop_scale_min: float, horizontal_flip: bool, generator: torch.Generator
) -> torch.Tensor:
    """A random crop of every image, resized bilinearly to `size`, and mirrored half of the time.

    Args:
        images: uint8 (N, 3, H, H).
        size: side of the result.
        crop_scale_min: smallest area of a crop, as a share of the image.
        horizontal_flip: whether images are mirrored at random.
        generator: source of all randomness.

    Returns:
        float32 (N, 3, size, size) in [0, 1].
    """
    count, stored = images.shape[0], images.shape[-1]

    def uniform(low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(count, generator=generator)

    area = uniform(crop_scale_min, 1.0)
    aspect = torch.exp(uniform(math.log(ASPECT_RATIOS[0]), math.log(ASPECT_RATIOS[1])))
    # Sides as shares of the image, and centres in the [-1, 1] coordinates of affine_grid.
    width = (area * aspect).sqrt().clamp_max(1)
    height = (area / aspect).sqrt().clamp_max(1)
    x = uniform(-1, 1) * (1 - width)
    y = uniform(-1, 1) * (1 - height)
    if horizontal_flip:
        width = torch.where(torch.rand(count, generator=generator) < 0.5, -width, width)
    zero = torch.zeros(count)
    transform = torch.stack([torch.stack([width, zero, x], 1), torch.stack([zero, height, y], 1)], 1)
    # Shrinking by bilinear sampling alone would alias: sample finer and average.
    oversampling = -(-stored // size)
    side = size * oversampling
    grid = F.affine_grid(transform, [count, 3, side, side], align_corners=False)
    floats = images.float().div_(255)
    crops = F.grid_sample(floats, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    return F.avg_pool2d(crops, oversampling) if oversampling > 1 else crops
