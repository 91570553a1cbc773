"""From a decoded image to what a network takes: resize, crop, scale to [0, 1]."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image

from lrrobust.errors import DataError

_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


@dataclass(frozen=True)
class Preprocessing:
    """Resize the shorter side, crop the centre, scale to [0, 1].

    Sizes and offsets are rounded as torchvision's `Resize` and `CenterCrop` do on Pillow images, so
    published accuracies can be met. An image that has the right size already is not touched.

    Args:
        input_size: side of the square that the network takes.
        resize_size: length of the shorter side before the crop; None means `input_size`.
        interpolation: "bilinear" or "bicubic", with antialiasing.

    Raises:
        DataError: `input_size` is below 1, `resize_size` is below it, or the interpolation is unknown.
    """

    input_size: int
    resize_size: int | None = None
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"

    def __post_init__(self) -> None:
        if self.input_size < 1:
            raise DataError(f"input_size: expected 1 or more, got {self.input_size}")
        if self.resize_size is not None and self.resize_size < self.input_size:
            raise DataError(f"resize_size: expected at least {self.input_size=}, got {self.resize_size}")
        if self.interpolation not in _FILTERS:
            raise DataError(f"interpolation: expected one of {', '.join(_FILTERS)}, got {self.interpolation!r}")

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """An RGB image -> float32 (3, input_size, input_size) in [0, 1], each value a multiple of 1/255."""
        pixels = torch.from_numpy(np.array(self.resize_and_crop(image)))
        return pixels.permute(2, 0, 1).to(torch.float32, memory_format=torch.contiguous_format).div_(255)

    def resize_and_crop(self, image: Image.Image) -> Image.Image:
        """The image in 8 bits with both sides `input_size`."""
        size = self.input_size
        shorter = self.resize_size if self.resize_size is not None else size
        if min(image.size) != shorter:
            scale = min(image.size)
            width, height = (shorter if side == scale else int(shorter * side / scale) for side in image.size)
            image = image.resize((width, height), _FILTERS[self.interpolation])
        if image.size == (size, size):
            return image
        left, top = (round((side - size) / 2) for side in image.size)
        return image.crop((left, top, left + size, top + size))
