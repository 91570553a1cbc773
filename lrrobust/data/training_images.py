"""All images of a data set decoded into memory, for training."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from lrrobust.data.class_lists import match_classes
from lrrobust.data.image_source import ImageSource
from lrrobust.data.parallel_map import map_in_order
from lrrobust.data.preprocessing import Preprocessing
from lrrobust.data.subset import choose_indices
from lrrobust.errors import DataError


def load_training_images(
    source: ImageSource,
    classes: Sequence[str],
    size: int,
    on_progress: Callable[[int, int], None] | None = None,
    holdout: tuple[int, int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Decode every image of a class in `classes`, in the order of the source.

    Args:
        source: the data set.
        classes: all classes of the model in label order.
        size: side of the square images returned; others are resized (shorter side) and cropped.
        on_progress: called now and then with how many images are decoded, and how many there are.
        holdout: `(n, seed)` leaves out the images that `build_evaluation_set(source, classes, ...,
            n=n, seed=seed, balanced=True)` draws, so that they can measure the training.

    Returns:
        uint8 (N, 3, size, size), and int64 labels (N,): positions in `classes`.

    Raises:
        DataError: no image is left, an image is damaged, or fewer than `n` can be held out.
    """
    positions, labels = match_classes(source.wnids, classes)
    if holdout is not None:
        held_out = set(choose_indices(labels, holdout[0], seed=holdout[1], balanced=True))
        kept = [i for i in range(len(labels)) if i not in held_out]
        positions, labels = [positions[i] for i in kept], [labels[i] for i in kept]
    if not positions:
        raise DataError(
            f"{source.name}: none of its {len(source)} images is left for training; "
            "check that its classes are those of the model, and the number held out"
        )
    preprocessing = Preprocessing(size)
    images = np.empty((len(positions), 3, size, size), dtype=np.uint8)

    def decode(i: int) -> None:
        images[i] = np.asarray(preprocessing.resize_and_crop(source.read(positions[i]))).transpose(2, 0, 1)

    map_in_order(decode, len(positions), on_progress)
    return torch.from_numpy(images), torch.tensor(labels, dtype=torch.int64)
