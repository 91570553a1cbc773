"""Training recipes: everything that decides what a training run computes, as a YAML file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from lrrobust.config_file import Settings, check_keys, locate, read_mapping
from lrrobust.data.preprocessing import Preprocessing
from lrrobust.errors import ConfigError
from lrrobust.models.residual import DEFAULT_STEM, Stem
from lrrobust.training.adversarial import AdversarialSpec
from lrrobust.training.mixing import MixingSpec

#: Shorter side before the central crop, over the crop.
RESIZE_OVER_CROP = 256 / 224

RECIPES_FOLDER = Path(__file__).parent / "recipes"

Fraction = Annotated[float, Field(ge=0, lt=1)]


class Phase(Settings):
    """Some epochs at one image size; small images first make training cheaper (progressive resizing)."""

    epochs: int = Field(ge=1)
    size: int = Field(ge=16, le=1024)


class Recipe(Settings):
    """A complete training recipe; the same one trains an LR-Net and its control."""

    name: str = Field(pattern=r"^[a-z0-9_]+$")
    description: str
    #: Label space of the data: a name known to `load_class_list`.
    classes: str
    #: Side of the images kept in memory, and of those the trained network is for.
    image_size: int = Field(ge=16, le=1024)
    #: "memory" decodes all images once, to image_size, and crops from those; "stream" reads and crops the originals
    #: anew for every epoch, as for ImageNet, which fills no memory and keeps every detail.
    loading: Literal["memory", "stream"] = "memory"
    #: How the network begins, see `models.residual.STEMS`.
    stem: Stem = DEFAULT_STEM
    phases: tuple[Phase, ...] = Field(min_length=1)
    batch_size: int = Field(ge=2)
    optimizer: Literal["adamw", "muon", "sgd"] = "adamw"
    learning_rate: float = Field(gt=0)
    weight_decay: float = Field(ge=0)
    #: Norm to which a step's gradient is clipped.
    gradient_clip: float = Field(gt=0)
    #: Share of all steps over which the learning rate rises linearly; a cosine takes it to zero after.
    warmup: Fraction
    label_smoothing: Fraction
    #: Decay of the exponential moving average of the weights, which is what is evaluated and shipped.
    ema_decay: Fraction
    #: Smallest area of a random crop, as a share of the image.
    crop_scale_min: float = Field(gt=0, le=1)
    horizontal_flip: bool
    #: One random operation on each image (Mueller and Hutter, ICCV 2021).
    trivial_augment: bool = False
    #: MixUp and CutMix.
    mixing: MixingSpec | None = None
    #: Train on attacked images instead of clean ones.
    adversarial: AdversarialSpec | None = None
    precision: Literal["float32", "bf16"]
    #: Training images held out, class-balanced, to follow the accuracy while training.
    holdout: int = Field(ge=0)
    seed: int = Field(ge=0)

    @property
    def preprocessing(self) -> Preprocessing:
        """What the trained network's images go through: as it was trained, or as ImageNet networks are measured."""
        is_streamed = self.loading == "stream"
        return Preprocessing(self.image_size, round(self.image_size * RESIZE_OVER_CROP) if is_streamed else self.image_size)

    @property
    def epochs(self) -> int:
        return sum(phase.epochs for phase in self.phases)

    def last_epoch(self, stop_after: int | None) -> int:
        """The number of epochs after which a training ends: all, or the first `stop_after` of them.

        Raises:
            ConfigError: there are not so many.
        """
        if stop_after is None:
            return self.epochs
        if not 1 <= stop_after <= self.epochs:
            raise ConfigError(
                f"--stop-after: expected 1 to {self.epochs}, the epochs of the recipe {self.name}, found {stop_after}: "
                "give a number among them, or leave the option out to train to the end"
            )
        return stop_after

    def size_of_epoch(self, epoch: int) -> int:
        """Image size of epoch 0, 1, ..."""
        for phase in self.phases:
            if epoch < phase.epochs:
                return phase.size
            epoch -= phase.epochs
        raise ValueError(f"the recipe {self.name} has {self.epochs} epochs, there is no epoch {epoch + self.epochs}")


def load_recipe(name_or_path: str | Path, precision: str | None = None) -> Recipe:
    """A shipped recipe by name, or one in a YAML file.

    Args:
        precision: replaces the recipe's, for processors on which its own is slow.

    Raises:
        UnknownNameError: neither a shipped recipe nor a file.
        ConfigError: names the file (or the option), the key, and what was expected there.
    """
    path = locate("recipe", name_or_path, RECIPES_FOLDER)
    recipe = check_keys(read_mapping(path, str(path), example="batch_size: 128"), Recipe, str(path))
    if precision is None:
        return recipe
    return check_keys({**recipe.model_dump(mode="json"), "precision": precision}, Recipe, "--precision")
