"""TrivialAugment on batches of tensors: one operation an image, drawn uniformly, at a strength drawn uniformly.

Source: Mueller and Hutter, TrivialAugment: Tuning-free Yet State-of-the-Art Data Augmentation, ICCV 2021, the wide
space of table 7. Strengths are continuous here, not one of 31 steps, and a shift is at most `MAX_SHIFT` of the
side instead of 32 pixels, which at 32 pixels would be all of the image.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

WARPS = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")
COLOUR_CHANGES = (
    "brightness", "colour", "contrast", "sharpness", "posterize", "solarize", "autocontrast", "equalize",
)  # fmt: skip
#: An operation's number is its place here.
OPERATIONS = ("identity", *WARPS, *COLOUR_CHANGES)

MAX_SHEAR = 0.99
MAX_SHIFT = 0.45
MAX_TURN = math.radians(135)
MAX_BLEND = 0.99
#: Posterizing leaves between 2 and 8 bits a colour.
FEWEST_BITS = 2

#: Grey of red, green and blue, ITU-R 601-2, as Pillow has it.
_GREY = (0.299, 0.587, 0.114)
#: Pillow's kernel for smoothing.
_SMOOTHING = ((1, 1, 1), (1, 5, 1), (1, 1, 1))


def draw_operations(count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """An operation (positions in `OPERATIONS`) and a strength in [-1, 1) for each image."""
    operation = torch.randint(len(OPERATIONS), (count,), generator=generator)
    return operation, 2 * torch.rand(count, generator=generator) - 1


def warps(operation: torch.Tensor, strength: torch.Tensor) -> torch.Tensor:
    """(N, 3, 3): where in [-1, 1] coordinates a warped image's pixels come from; the identity for other operations."""
    matrices = torch.eye(3).repeat(len(operation), 1, 1)

    def put(name: str, row: int, column: int, values: torch.Tensor) -> None:
        chosen = operation == OPERATIONS.index(name)
        matrices[chosen, row, column] = values[chosen]

    put("shear_x", 0, 1, MAX_SHEAR * strength)
    put("shear_y", 1, 0, MAX_SHEAR * strength)
    # The side is 2 in these coordinates.
    put("translate_x", 0, 2, 2 * MAX_SHIFT * strength)
    put("translate_y", 1, 2, 2 * MAX_SHIFT * strength)
    turn = MAX_TURN * strength
    put("rotate", 0, 0, turn.cos())
    put("rotate", 0, 1, -turn.sin())
    put("rotate", 1, 0, turn.sin())
    put("rotate", 1, 1, turn.cos())
    return matrices


def change_colours(images: torch.Tensor, operation: torch.Tensor, strength: torch.Tensor) -> torch.Tensor:
    """Applies the operations on colours to float images (N, 3, H, W) in [0, 1], in place; others are left alone."""
    for name in COLOUR_CHANGES:
        # Found on the CPU, where the draws are: the device is never waited for.
        rows = (operation == OPERATIONS.index(name)).nonzero().squeeze(1)
        if len(rows) == 0:
            continue
        rows_there = rows.to(images.device, non_blocking=True)
        strengths = strength[rows].to(images.device, non_blocking=True).view(-1, 1, 1, 1)
        images[rows_there] = _CHANGES[name](images[rows_there], strengths)
    return images


def _grey(images: torch.Tensor) -> torch.Tensor:
    red, green, blue = _GREY
    return red * images[:, :1] + green * images[:, 1:2] + blue * images[:, 2:]


def _blend(images: torch.Tensor, plain: torch.Tensor, strength: torch.Tensor) -> torch.Tensor:
    """Towards `plain` for strengths below zero, away from it above."""
    return torch.lerp(plain.expand_as(images), images, 1 + MAX_BLEND * strength).clamp(0, 1)


def _brightness(images: torch.Tensor, strength: torch.Tensor) -> torch.Tensor:
    return _blend(images, torch.zeros_like(images), strength)


def _colour(images: torch.Tensor, strength: torch.Tensor) -> torch.Tensor:
    return _blend(images, _grey(images), strength)


def _contrast(images: torch.Tensor, strength: torch.Tensor) -> torch.Tensor:
    return _blend(images, _grey(images).mean((2, 3), keepdim=True), strength)


def _sharpness(images: torch.Tensor, strength: torch.Tensor) -> torch.Tensor:
    kernel = torch.tensor(_SMOOTHING, dtype=images.dtype)
    kernel = (kernel / kernel.sum()).to(images.device, non_blocking=True).expand(3, 1, 3, 3)
    smooth = F.conv2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), kernel, groups=3)
    return _blend(images, smooth, strength)


def _posterize(images: torch.Tensor, strength: torch.Tensor) -> torch.Tensor:
    dropped = ((8 - FEWEST_BITS) * strength.abs()).round()
    step = torch.exp2(dropped)
    # Half a grey level more, or rounding would turn a level into the one below.
    return ((images * 255 + 0.5) / step).floor() * step / 255


def _solarize(images: torch.Tensor, strength: torch.Tensor) -> torch.Tensor:
    return torch.where(images >= 1 - strength.abs(), 1 - images, images)


def _autocontrast(images: torch.Tensor, strength: torch.Tensor) -> torch.Tensor:
    low, high = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
    extent = high - low
    # A colour of one value stays as it is.
    return torch.where(extent > 0, (images - low) / extent.clamp_min(1 / 510), images).clamp(0, 1)


def _equalize(images: torch.Tensor, strength: torch.Tensor) -> torch.Tensor:
    """Each colour's grey levels mapped so that they are spread evenly, as Pillow's `ImageOps.equalize` does."""
    levels = (images * 255).round().long().flatten(2)
    counts = torch.zeros(*levels.shape[:2], 256, dtype=torch.long, device=images.device)
    counts.scatter_add_(2, levels, torch.ones_like(levels))
    below = counts.cumsum(2) - counts
    # The highest level present is not shared out: it becomes 255 itself.
    highest = levels.amax(2, keepdim=True)
    step = (levels.shape[2] - counts.gather(2, highest)) // 255
    table = ((below + step // 2) // step.clamp_min(1)).clamp(0, 255)
    mapped = table.gather(2, levels).view_as(images) / 255
    return torch.where((step > 0).unsqueeze(3), mapped, images)


_CHANGES = {
    "brightness": _brightness,
    "colour": _colour,
    "contrast": _contrast,
    "sharpness": _sharpness,
    "posterize": _posterize,
    "solarize": _solarize,
    "autocontrast": _autocontrast,
    "equalize": _equalize,
}
