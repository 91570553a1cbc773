"""From a recipe and its images to the batches of an epoch, each a function of (seed, epoch, step) alone."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import tee

import torch

from lrrobust.training.augmentation import augment, draw_views
from lrrobust.training.images import Batch, TrainingImages
from lrrobust.training.mixing import mix
from lrrobust.training.ranks import Ranks
from lrrobust.training.recipe import Recipe

#: What random numbers are for: the first number after the seed, so that no stream is used twice.
ORDER, VIEWS, STARTS = 0, 1, 2


def seeded(*parts: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator whose stream is a function of the integers given."""
    seed = 0
    for part in parts:
        seed = (seed * 1_000_003 + part + 1) % (2**63)
    return torch.Generator(device).manual_seed(seed)


def augmented_batches(
    images: TrainingImages,
    recipe: Recipe,
    num_classes: int,
    epoch: int,
    first_step: int,
    device: torch.device,
    ranks: Ranks,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """This process's part of the batches of an epoch, from step `first_step` of the whole training on.

    Which images a batch holds and what happens to each follows from the recipe's seed, the epoch and the step: it
    does not depend on the number of processes, nor on where an interrupted training went on.

    Yields:
        images float32 (n, 3, size, size) in [0, 1], channels innermost, and int64 labels (n,) or, where the recipe
        mixes, the share of each class (n, num_classes); both on `device`.
    """
    steps_per_epoch = len(images.labels) // recipe.batch_size
    order = torch.randperm(len(images.labels), generator=seeded(recipe.seed, ORDER, epoch))
    own = ranks.rows(recipe.batch_size)
    size = recipe.size_of_epoch(epoch)

    def plan() -> Iterator[Batch]:
        for step in range(first_step, (epoch + 1) * steps_per_epoch):
            offset = (step % steps_per_epoch) * recipe.batch_size
            views = draw_views(
                recipe.batch_size,
                crop_scale_min=recipe.crop_scale_min,
                horizontal_flip=recipe.horizontal_flip,
                trivial_augment=recipe.trivial_augment,
                mixing=recipe.mixing,
                generator=seeded(recipe.seed, VIEWS, step),
            )
            yield Batch(order[offset : offset + recipe.batch_size][own], views[own], size)

    # The images may be asked for ahead of the steps.
    planned, asked = tee(plan())
    for batch, stored in zip(planned, images.batches(asked), strict=True):
        pixels = augment(stored.to(device, non_blocking=True), size, batch.views, are_cropped=images.are_cropped)
        targets = images.labels[batch.positions].to(device, non_blocking=True)
        if batch.views.mixing is not None:
            pixels, targets = mix(pixels, targets, num_classes, batch.views.mixing)
        yield pixels.contiguous(memory_format=torch.channels_last), targets
