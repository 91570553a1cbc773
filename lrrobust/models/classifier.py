"""A network together with what is needed to evaluate it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import nn

from lrrobust.errors import ModelError

#: Side of an image, in pixels: the bytes of larger ones cannot be counted. As manifests are read.
_LARGEST_SIZE = 10**6


@dataclass(frozen=True)
class Classifier:
    """A network from images in [0, 1] to logits, and the meaning of both ends.

    Args:
        module: (N, 3, input_size, input_size) in [0, 1] -> logits (N, len(classes)); normalisation is
            its own business.
        classes: name of each class in label order; WordNet ids for ImageNet and its subsets.
        input_size: side of the images it takes, in pixels; attacks work at this size.
        resize_size: shorter side to which images are resized before the central crop of `input_size`;
            `input_size` itself where None.
        interpolation: how images are resized.
        weights: where the weights come from, for people.
        recipe: name and hash of how they were trained, where the weights say; empty where not known.
        followed: how far, as in "10 of 17 epochs"; empty where not known.
        files: Python files of the user's that define its layers, absolute; they tell models apart.
        name: what tables call it, where it was not asked for by a name.
    """

    module: nn.Module
    classes: tuple[str, ...]
    input_size: int
    resize_size: int | None = None
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    weights: str = ""
    recipe: str = ""
    followed: str = ""
    files: tuple[Path, ...] = ()
    name: str = ""

    def __post_init__(self) -> None:
        if isinstance(self.classes, str):
            raise ModelError(
                f"a Classifier needs the names of its classes, got the text {self.classes!r}: give them as a tuple"
            )
        object.__setattr__(self, "classes", tuple(self.classes))
        no_name = next((name for name in self.classes if not isinstance(name, str)), None)
        if no_name is not None:
            raise ModelError(f"a Classifier needs the names of its classes as texts, got {no_name!r} among them")
        if not isinstance(self.module, nn.Module):
            raise ModelError(f"a Classifier needs a torch.nn.Module, got {type(self.module).__name__}")
        if len(set(self.classes)) != len(self.classes) or len(self.classes) < 2:
            raise ModelError(f"a Classifier needs at least two classes, all different, got {len(self.classes)}")
        sizes = [self.input_size] if self.resize_size is None else [self.input_size, self.resize_size]
        if any(type(size) is not int for size in sizes):
            raise ModelError(f"a Classifier needs whole numbers, got {self.input_size=}, {self.resize_size=}")
        if not 1 <= self.input_size <= sizes[-1] <= _LARGEST_SIZE:
            raise ModelError(
                f"a Classifier needs 1 <= input_size <= resize_size <= {_LARGEST_SIZE}, got {self.input_size=}, "
                f"{self.resize_size=}"
            )
