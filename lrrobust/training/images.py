"""The images that are trained on: all in memory, or read and decoded while the training runs."""

from __future__ import annotations

import hashlib
import json
import signal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import compress
from typing import NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from lrrobust.data.image_source import ImageSource
from lrrobust.data.preprocessing import Preprocessing
from lrrobust.data.subset import choose_indices
from lrrobust.errors import DataError
from lrrobust.training.augmentation import Views, crop_box

#: Batches each decoding process prepares ahead.
_PREFETCHED = 4


class Batch(NamedTuple):
    """Which images come next: positions (N,), what was drawn for them, and the side they are wanted at."""

    positions: torch.Tensor
    views: Views
    size: int


class TrainingImages(Protocol):
    """What the training loop needs of its images.

    Attributes:
        labels: int64 (N,), on the CPU.
        are_cropped: whether `batches` makes the crops of the views, or leaves them to `augment`.
    """

    labels: torch.Tensor
    are_cropped: bool

    def sha256(self) -> str:
        """Identifies images and labels."""

    def split(self, holdout: int, seed: int) -> tuple[TrainingImages, TrainingImages]:
        """All but `holdout` images, and the class-balanced held-out ones."""

    def to(self, device: torch.device) -> TrainingImages:
        """The same images, prepared for a network on that device."""

    def batches(self, batches: Iterable[Batch]) -> Iterator[torch.Tensor]:
        """uint8 (n, 3, H, H) of each batch asked for, in order."""

    def whole(
        self, positions: range, preprocessing: Preprocessing, batch_size: int
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Batches of images without augmentation, uint8 (n, 3, H, H), and their labels (n,) on the CPU."""


def _held_out(labels: torch.Tensor, holdout: int, seed: int) -> torch.Tensor:
    held = torch.zeros(len(labels), dtype=torch.bool)
    if holdout:
        held[choose_indices(labels.tolist(), holdout, seed=seed, balanced=True)] = True
    return held


@dataclass(frozen=True)
class TrainingSet:
    """Images in memory, the device's own where they fit: uint8 (N, 3, H, H) and int64 labels (N,)."""

    images: torch.Tensor
    labels: torch.Tensor
    are_cropped = False

    def sha256(self) -> str:
        digest = hashlib.sha256()
        for tensor in (self.images, self.labels):
            digest.update(tensor.cpu().contiguous().numpy().data)
        return digest.hexdigest()

    def split(self, holdout: int, seed: int) -> tuple[TrainingSet, TrainingSet]:
        held = _held_out(self.labels, holdout, seed)
        return TrainingSet(self.images[~held], self.labels[~held]), TrainingSet(self.images[held], self.labels[held])

    def to(self, device: torch.device) -> TrainingSet:
        if device.type == "cpu":
            return self
        # Half of what is free is left to the network.
        if 2 * self.images.nbytes < torch.cuda.mem_get_info(device)[0]:
            return replace(self, images=self.images.to(device))
        return replace(self, images=self.images.pin_memory())

    def batches(self, batches: Iterable[Batch]) -> Iterator[torch.Tensor]:
        for batch in batches:
            yield self.images[batch.positions.to(self.images.device, non_blocking=True)]

    def whole(
        self, positions: range, preprocessing: Preprocessing, batch_size: int
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for start in range(0, len(positions), batch_size):
            part = positions[start : start + batch_size]
            # No list of positions, which a GPU would be waited for to look up.
            chosen = slice(part.start, part.stop, part.step)
            yield self.images[chosen], self.labels[chosen]


class _Wanted(NamedTuple):
    """One image: its index in the source, the side it is wanted at, and its crop, see `Views.crops`.

    Without a crop the whole image is resized and cut as `preprocessing` says. Plain numbers, since this is sent to
    another process.
    """

    index: int
    size: int
    crop: tuple[float, float, float, float] | None
    preprocessing: Preprocessing | None = None


class _Decoded(Dataset):
    """From what is wanted to uint8 (3, size, size), or to the error that explains why it cannot be had."""

    def __init__(self, source: ImageSource) -> None:
        self._source = source

    def __getitem__(self, wanted: _Wanted) -> torch.Tensor | DataError:
        try:
            image = self._source.read(wanted.index)
        except DataError as error:
            return error  # raised in another process it would come back with its whole traceback for a message
        size = wanted.size
        if wanted.crop is None:
            image = wanted.preprocessing.resize_and_crop(image)
        else:
            box = crop_box(*wanted.crop, *image.size)
            # `reducing_gap` averages whole blocks of pixels first: several times faster on large photos.
            image = image.resize((size, size), Image.Resampling.BILINEAR, box=box, reducing_gap=2.0)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _collate(images: list[torch.Tensor | DataError]) -> torch.Tensor | DataError:
    return next((image for image in images if isinstance(image, DataError)), None) or torch.stack(images)


def _ignore_interrupts(_: int) -> None:
    # Ctrl-C reaches every process of the terminal; the one that trains ends the others in good order.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@dataclass(frozen=True)
class StreamedImages:
    """Images of any size, read and cropped by other processes ahead of the steps that need them.

    Attributes:
        source: where the images are; read from several processes at once.
        positions: of the images in `source`.
        labels: int64 (N,).
        workers: processes that decode; 0 decodes between the steps.
        device: where batches go.
    """

    source: ImageSource
    positions: tuple[int, ...]
    labels: torch.Tensor
    workers: int
    device: torch.device = torch.device("cpu")
    are_cropped = True

    def sha256(self) -> str:
        """Of names and labels: to read all bytes of a large data set would take an hour."""
        digest = hashlib.sha256()
        for position, label in zip(self.positions, self.labels.tolist(), strict=True):
            digest.update(json.dumps([self.source.keys[position], label]).encode() + b"\n")
        return digest.hexdigest()

    def split(self, holdout: int, seed: int) -> tuple[StreamedImages, StreamedImages]:
        held = _held_out(self.labels, holdout, seed)
        rest, chosen = (
            replace(self, positions=tuple(compress(self.positions, mask.tolist())), labels=self.labels[mask])
            for mask in (~held, held)
        )
        return rest, chosen

    def to(self, device: torch.device) -> StreamedImages:
        return replace(self, device=device)

    def batches(self, batches: Iterable[Batch]) -> Iterator[torch.Tensor]:
        return self._load(
            [
                _Wanted(self.positions[position], batch.size, crop)
                for position, crop in zip(batch.positions.tolist(), batch.views.crops(), strict=True)
            ]
            for batch in batches
        )

    def whole(
        self, positions: range, preprocessing: Preprocessing, batch_size: int
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        parts = [positions[start : start + batch_size] for start in range(0, len(positions), batch_size)]
        images = self._load(
            [_Wanted(self.positions[i], preprocessing.input_size, None, preprocessing) for i in part] for part in parts
        )
        for part, decoded in zip(parts, images, strict=True):
            yield decoded, self.labels[list(part)]

    def _load(self, wanted: Iterable[list[_Wanted]]) -> Iterator[torch.Tensor]:
        loader = DataLoader(
            _Decoded(self.source),
            batch_sampler=wanted,
            collate_fn=_collate,
            num_workers=self.workers,
            prefetch_factor=_PREFETCHED if self.workers else None,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=_ignore_interrupts,
            # Its own, so that the global generator is left alone.
            generator=torch.Generator(),
        )
        for images in loader:
            if isinstance(images, DataError):
                raise images
            yield images.to(self.device, non_blocking=True)
