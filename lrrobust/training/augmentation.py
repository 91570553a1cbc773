"""Random views of whole batches: crops, flips, TrivialAugment and mixing, reproducible from a generator.

What happens to every image is drawn first, on the CPU, for a whole batch at once (`draw_views`); the pixels are then
computed wherever they lie (`augment`, `mix`). So a step's randomness depends on its generator alone, not on
the device nor on how many processes share the batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F

from lrrobust.training.mixing import MixingSpec, draw_mixing
from lrrobust.training.trivial_augment import change_colours, draw_operations, warps

#: Width over height of a random crop lies between these, as in Szegedy et al., CVPR 2015, section 6.
ASPECT_RATIOS = (3 / 4, 4 / 3)


@dataclass(frozen=True)
class Views:
    """What is drawn for each of N images; all tensors on the CPU, with N rows.

    Attributes:
        area, aspect: of the crop: share of the image's area, and width over height.
        x, y: where the crop lies, in [-1, 1] from one edge of the image to the other.
        is_mirrored: whether left and right are exchanged.
        operation, strength: of TrivialAugment, see `trivial_augment`; None without it.
        mixing: share of the image itself, whether by CutMix, and the box's centre (N, 4); None without mixing.
    """

    area: torch.Tensor
    aspect: torch.Tensor
    x: torch.Tensor
    y: torch.Tensor
    is_mirrored: torch.Tensor
    operation: torch.Tensor | None = None
    strength: torch.Tensor | None = None
    mixing: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.area)

    def __getitem__(self, rows: slice) -> Views:
        columns = {field.name: getattr(self, field.name) for field in fields(self)}
        return Views(**{name: None if column is None else column[rows] for name, column in columns.items()})

    def crops(self) -> Iterator[tuple[float, float, float, float]]:
        """What `crop_box` needs to know of each image."""
        return zip(self.area.tolist(), self.aspect.tolist(), self.x.tolist(), self.y.tolist(), strict=True)


def draw_views(
    count: int,
    *,
    crop_scale_min: float,
    horizontal_flip: bool,
    generator: torch.Generator,
    trivial_augment: bool = False,
    mixing: MixingSpec | None = None,
) -> Views:
    """Draws what happens to `count` images.

    Args:
        crop_scale_min: smallest area of a crop, as a share of the image.
        horizontal_flip: whether images are mirrored, half of the time.
        generator: on the CPU, source of all randomness.
        trivial_augment: whether each image gets one operation of TrivialAugment.
        mixing: whether and how neighbours are mixed.
    """

    def uniform(low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(count, generator=generator)

    area = uniform(crop_scale_min, 1.0)
    aspect = torch.exp(uniform(math.log(ASPECT_RATIOS[0]), math.log(ASPECT_RATIOS[1])))
    x, y = uniform(-1, 1), uniform(-1, 1)
    is_mirrored = torch.zeros(count, dtype=torch.bool)
    if horizontal_flip:
        is_mirrored = torch.rand(count, generator=generator) < 0.5
    operation, strength = draw_operations(count, generator) if trivial_augment else (None, None)
    drawn = None if mixing is None else draw_mixing(count, mixing, generator)
    return Views(area, aspect, x, y, is_mirrored, operation, strength, drawn)


def augment(images: torch.Tensor, size: int, views: Views, *, are_cropped: bool = False) -> torch.Tensor:
    """Every image as its view has it, but for mixing, resized bilinearly to `size`.

    TrivialAugment's shifts, turns and shears are made in one sampling together with the crop, so what they bring
    into the picture is the image around the crop, and a reflection beyond the image's edge; never black.

    Args:
        images: uint8 (N, 3, H, H) on any device.
        size: side of the result.
        views: of these N images.
        are_cropped: whether the crop has been made when the image was decoded.

    Returns:
        float32 (N, 3, size, size) in [0, 1].
    """
    count, stored = images.shape[0], images.shape[-1]
    transform = _crops(views, are_cropped)
    if views.operation is not None:
        transform = transform @ warps(views.operation, views.strength)
    # Shrinking by bilinear sampling alone would alias: sample finer and average.
    oversampling = -(-stored // size)
    side = size * oversampling
    theta = transform[:, :2].to(images.device, non_blocking=True)
    grid = F.affine_grid(theta, [count, 3, side, side], align_corners=False)
    floats = images.float().div_(255)
    floats = F.grid_sample(floats, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    if oversampling > 1:
        floats = F.avg_pool2d(floats, oversampling)
    if views.operation is None:
        return floats
    # Sampling may overshoot by rounding; the operations on colours take [0, 1] at its word.
    return change_colours(floats.clamp_(0, 1), views.operation, views.strength)


def crop_box(area: float, aspect: float, x: float, y: float, width: int, height: int) -> tuple[float, float, float, float]:
    """Left, upper, right and lower edge in pixels of the crop of an image of width x height; see `Views`."""
    wide = min(math.sqrt(area * aspect * width * height), width)
    high = min(math.sqrt(area / aspect * width * height), height)
    left, upper = (width - wide) * (1 + x) / 2, (height - high) * (1 + y) / 2
    # Sums may pass the edge by rounding.
    return left, upper, min(left + wide, width), min(upper + high, height)


def _crops(views: Views, are_cropped: bool) -> torch.Tensor:
    """(N, 3, 3): from the [-1, 1] coordinates of a view to those of the stored image, as `affine_grid` has them."""
    one, zero = torch.ones(len(views)), torch.zeros(len(views))
    width, height, x, y = one, one, zero, zero
    if not are_cropped:
        # Sides as shares of the image.
        width = (views.area * views.aspect).sqrt().clamp_max(1)
        height = (views.area / views.aspect).sqrt().clamp_max(1)
        x, y = views.x * (1 - width), views.y * (1 - height)
    width = torch.where(views.is_mirrored, -width, width)
    rows = [torch.stack(row, 1) for row in ((width, zero, x), (zero, height, y), (zero, zero, one))]
    return torch.stack(rows, 1)
