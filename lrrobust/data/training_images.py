"""All images of a data set decoded into memory, for training."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from lrrobust.data.class_lists import match_classes, no_known_class
from lrrobust.data.image_source import ImageSource
from lrrobust.data.parallel_map import OnProgress, map_in_order
from lrrobust.data.preprocessing import Preprocessing
from lrrobust.errors import DataError


def match_training_images(source: ImageSource, classes: Sequence[str]) -> tuple[list[int], list[int]]:
    """As `match_classes`; DataError where no image is of these classes."""
    positions, labels = match_classes(source.wnids, classes)
    if not positions:
        raise DataError(no_known_class(source.name, source.wnids, classes))
    return positions, labels


def load_training_images(
    source: ImageSource,
    classes: Sequence[str],
    size: int,
    on_progress: OnProgress | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Decode every image of a class in `classes`, in the order of the source.

    Args:
        source: the data set.
        classes: all classes of the model in label order.
        size: side of the square images returned; others are resized (shorter side) and cropped.
        on_progress: called now and then with how many images are decoded, and how many there are.

    Returns:
        uint8 (N, 3, size, size), and int64 labels (N,): positions in `classes`.

    Raises:
        DataError: no image is of these classes, or an image is damaged.
    """
    positions, labels = match_training_images(source, classes)
    preprocessing = Preprocessing(size)
    images = np.empty((len(positions), 3, size, size), dtype=np.uint8)

    def decode(i: int) -> None:
        images[i] = np.asarray(preprocessing.resize_and_crop(source.read(positions[i]))).transpose(2, 0, 1)

    map_in_order(decode, len(positions), on_progress)
    return torch.from_numpy(images), torch.tensor(labels, dtype=torch.int64)
