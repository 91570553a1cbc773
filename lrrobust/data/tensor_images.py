"""Images that are in memory already, as an evaluation takes them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch


class TensorImages:
    """Labelled images of a tensor.

    Args:
        name: what a report calls them.
        images: (N, C, H, W), float32 in [0, 1], N at least 1.
        labels: (N,), int64, positions in `classes`.
        classes: names of all classes, in label order.

    Raises:
        ValueError: images or labels are not what they must be.
    """

    def __init__(self, name: str, images: torch.Tensor, labels: torch.Tensor, classes: Sequence[str]) -> None:
        check_images(images, labels)
        if not ((labels >= 0) & (labels < len(classes))).all():
            raise ValueError(f"expected labels of 0 to {len(classes) - 1}, got {int(labels.min())} to {int(labels.max())}")
        self.name = name
        self.labels = tuple(labels.tolist())
        self.wnids = tuple(classes[label] for label in self.labels)
        self.indices = range(len(images))
        # By numbers: random starts follow from them, and not from how classes are called.
        self.keys = tuple(f"{label}/{index}" for index, label in enumerate(self.labels))
        self._images = images.detach()

    def __len__(self) -> int:
        return len(self._images)

    def load(self, positions: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """float32 (n, C, H, W) in [0, 1] and int64 labels (n,) of images counted from 0, in any order."""
        places = list(positions)
        return self._images[places], torch.tensor([self.labels[place] for place in places], dtype=torch.int64)

    @property
    def copies(self) -> int:
        """Images of the same values as an earlier one."""
        return len(self) - len({hashlib.sha256(image.cpu().contiguous().numpy().tobytes()).digest() for image in self._images})

    def record(self) -> dict[str, Any]:
        """What a result has to say about its images, JSON-ready."""
        total = hashlib.sha256(repr((tuple(self._images.shape), self.wnids)).encode())
        for image in self._images:
            total.update(image.cpu().contiguous().numpy().tobytes())
        return {
            "name": self.name,
            "sha256": total.hexdigest(),
            "n": len(self),
            "left_out_count": 0,
            "corrupt_keys": [],
            "subset": {"explicit": len(self)},
        }


def check_images(images: torch.Tensor, labels: torch.Tensor) -> None:
    """Raises ValueError unless these are images (N, C, H, W), float32 in [0, 1], and as many int64 labels."""
    for what, given, hint in (("images", images, "torch.from_numpy(images)"), ("labels", labels, "torch.tensor(labels)")):
        if not isinstance(given, torch.Tensor):
            raise ValueError(f"expected {what} as a torch.Tensor, got {type(given).__name__}: {hint}")
    if images.dtype == torch.uint8:
        raise ValueError("expected float32 images in [0, 1], got uint8: images.float() / 255")
    if images.ndim == 3:
        raise ValueError(f"expected float32 images (N, C, H, W), got one of {tuple(images.shape)}: images[None]")
    if images.layout != torch.strided or images.is_meta:
        raise ValueError("expected images with values in a dense tensor")
    if images.ndim != 4 or images.dtype != torch.float32 or not images.numel():
        raise ValueError(
            f"expected at least one float32 image, (N, C, H, W), got {tuple(images.shape)}, {images.dtype}: images.float()"
        )
    least, largest = (float(bound) for bound in images.detach().aminmax())
    # Written so that NaN is refused.
    if not (least >= 0 and largest <= 1):
        hint = "images / 255" if least >= 0 and 2 < largest <= 255 else "let the model normalise by itself"
        raise ValueError(f"expected images in [0, 1], got {least:g} to {largest:g}: {hint}")
    if labels.shape != images.shape[:1] or labels.dtype != torch.int64:
        hint = "labels.long()" if labels.ndim < 2 else "labels.argmax(1)" if labels.shape[1] > 1 else "labels.flatten().long()"
        raise ValueError(f"expected int64 labels ({len(images)},), got {tuple(labels.shape)}, {labels.dtype}: {hint}")
