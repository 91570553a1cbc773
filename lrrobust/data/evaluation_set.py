"""The images an evaluation runs over: labelled, chosen, checked, and identified by a hash."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from lrrobust.data.class_lists import composed, match_classes, no_known_class
from lrrobust.data.image_source import CorruptImageError, ImageSource
from lrrobust.data.parallel_map import OnProgress, map_in_order
from lrrobust.data.preprocessing import Preprocessing
from lrrobust.data.subset import choose_indices
from lrrobust.errors import DataError

_KEYS_SHOWN = 5


@dataclass(frozen=True, eq=False)
class EvaluationSet:
    """Labelled images that could all be decoded; build it with `build_evaluation_set`.

    Attributes:
        name: of the data set.
        indices: position of each image in the data set, ascending.
        keys: `<class>/<file name>` of each image.
        wnids: class of each image.
        labels: position of that class in the classes of the model.
        sha256: identifies keys, encoded bytes and classes, however the data set is packed.
        left_out_count: images of the data set whose class is not among those asked for.
        left_out_classes: these classes, sorted, and the classes asked for that no image of the data set has, in label order.
        corrupt_keys: chosen images that were dropped because they cannot be decoded.
        subset: how the images were chosen, JSON-ready.
    """

    name: str
    indices: tuple[int, ...]
    keys: tuple[str, ...] = field(repr=False)
    wnids: tuple[str, ...] = field(repr=False)
    labels: tuple[int, ...] = field(repr=False)
    sha256: str
    left_out_count: int
    left_out_classes: tuple[tuple[str, ...], tuple[str, ...]]
    corrupt_keys: tuple[str, ...]
    subset: dict[str, Any]
    _source: ImageSource = field(repr=False)
    _preprocessing: Preprocessing
    _digests: tuple[bytes, ...] = field(repr=False)

    def __len__(self) -> int:
        return len(self.indices)

    def load(self, positions: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Read images as the network takes them.

        Args:
            positions: which, counted within this set from 0, in any order.

        Returns:
            float32 (n, 3, H, W) in [0, 1], contiguous, and int64 labels (n,).

        Raises:
            DataError: an image can no longer be read, or is not the one that was checked.
        """
        size = self._preprocessing.input_size
        images = torch.empty((len(positions), 3, size, size), dtype=torch.float32)
        for row, position in enumerate(positions):
            index = self.indices[position]
            encoded = self._source.read_bytes(index)
            if hashlib.sha256(encoded).digest() != self._digests[position]:
                raise DataError(
                    f"{self.name}: image {self.keys[position]!r} changed while the evaluation ran; "
                    "leave the data set alone and run again"
                )
            images[row] = self._preprocessing(self._source.decode(index, encoded))
        return images, torch.tensor([self.labels[position] for position in positions], dtype=torch.int64)

    @property
    def input_size(self) -> int:
        """Side of the images in pixels, as the model takes them."""
        return self._preprocessing.input_size

    @property
    def copies(self) -> int:
        """Images of the same bytes as an earlier one, under another name."""
        return len(self._digests) - len(set(self._digests))

    def seen_by(self, classes: Sequence[str], preprocessing: Preprocessing) -> EvaluationSet:
        """The same images for another model that knows their classes; nothing is read or checked again."""
        label_of = {composed(wnid): label for label, wnid in enumerate(classes)}
        return replace(self, labels=tuple(label_of[composed(wnid)] for wnid in self.wnids), _preprocessing=preprocessing)

    def record(self) -> dict[str, Any]:
        """What a result has to say about its images, JSON-ready."""
        return {
            "name": self.name,
            "sha256": self.sha256,
            "n": len(self),
            "left_out_count": self.left_out_count,
            "corrupt_keys": list(self.corrupt_keys),
            "subset": dict(self.subset),
        }


def build_evaluation_set(
    source: ImageSource,
    classes: Sequence[str],
    preprocessing: Preprocessing,
    *,
    known_classes: Collection[str] | None = None,
    n: int | None = None,
    seed: int = 0,
    balanced: bool = False,
    indices: Sequence[int] | None = None,
    skip_corrupt: bool = False,
    on_progress: OnProgress | None = None,
) -> EvaluationSet:
    """Choose images of the classes of a model, and read and decode each once to check it.

    Args:
        source: the data set.
        classes: all classes of the model in label order.
        preprocessing: from a decoded image to what the model takes.
        known_classes: if given, images of other classes are left out as well.
        n: how many images to draw; None takes all.
        seed: of the draw.
        balanced: draw equally many images of each class, as far as there are enough.
        indices: takes the place of a draw: positions in `source`, in any order.
        skip_corrupt: drop chosen images that cannot be decoded, instead of raising.
        on_progress: called now and then with how many images are checked, and how many there are.

    Raises:
        DataError: no image is left; `n` or `indices` ask for what is not there; an image cannot be
            decoded and `skip_corrupt` is False; the data set cannot be read.
    """
    eligible, labels = match_classes(source.wnids, classes, known_classes)
    wanted, _ = match_classes(classes, classes, known_classes)
    if not eligible:
        raise DataError(no_known_class(source.name, source.wnids, classes))
    label_of = dict(zip(eligible, labels))
    if indices is None:
        drawn = choose_indices(labels, n, seed=seed, balanced=balanced)
        chosen = [eligible[position] for position in drawn]
        subset: dict[str, Any] = {"n": n, "seed": seed, "balanced": balanced}
    else:
        if n is not None or balanced:
            raise DataError("expected either explicit indices or a draw (n, balanced), got both; drop one")
        chosen = _check_indices(indices, source, label_of)
        subset = {"explicit": len(chosen)}

    def digest(position: int) -> bytes | None:
        index = chosen[position]
        try:
            encoded = source.read_bytes(index)
            source.decode(index, encoded)
        except CorruptImageError:
            return None
        return hashlib.sha256(encoded).digest()

    digests = dict(zip(chosen, map_in_order(digest, len(chosen), on_progress)))
    corrupt = [index for index in chosen if digests[index] is None]
    if corrupt and not skip_corrupt:
        _raise_corrupt(source, corrupt, len(chosen))
    whole = [index for index in chosen if digests[index] is not None]
    if not whole:
        raise DataError(f"{source.name}: none of the {len(chosen)} chosen images can be decoded; check the data set")
    return EvaluationSet(
        name=source.name,
        indices=tuple(whole),
        keys=tuple(source.keys[index] for index in whole),
        wnids=tuple(source.wnids[index] for index in whole),
        labels=tuple(label_of[index] for index in whole),
        sha256=_hash_images((source.keys[index], digests[index].hex(), source.wnids[index]) for index in whole),
        left_out_count=len(source) - len(eligible),
        left_out_classes=_unmatched(source.wnids, [classes[label] for label in wanted]),
        corrupt_keys=tuple(source.keys[index] for index in corrupt),
        subset=subset,
        _source=source,
        _preprocessing=preprocessing,
        _digests=tuple(digests[index] for index in whole),
    )


def _unmatched(found: Sequence[str], wanted: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What either has and the other lacks."""
    here, there = set(map(composed, found)), set(map(composed, wanted))
    return tuple(sorted(here - there)), tuple(name for name in wanted if composed(name) not in here)


def _check_indices(indices: Sequence[int], source: ImageSource, label_of: dict[int, int]) -> list[int]:
    chosen = sorted(int(index) for index in indices)
    if not chosen:
        raise DataError("expected at least one index of an image, got none")
    for index, following in zip(chosen, chosen[1:]):
        if index == following:
            raise DataError(f"index {index} is given twice; give every image once")
    for index in chosen:
        if not 0 <= index < len(source):
            raise DataError(f"{source.name}: expected indices from 0 to {len(source) - 1}, got {index}")
        if index not in label_of:
            raise DataError(
                f"{source.name}: image {index} ({source.keys[index]!r}) is of class {source.wnids[index]!r}, "
                "which is not among the classes to evaluate; drop this index"
            )
    return chosen


def _raise_corrupt(source: ImageSource, corrupt: Sequence[int], chosen_count: int) -> None:
    keys = ", ".join(repr(source.keys[index]) for index in corrupt[:_KEYS_SHOWN])
    more = f" and {len(corrupt) - _KEYS_SHOWN} more" if len(corrupt) > _KEYS_SHOWN else ""
    raise DataError(
        f"{source.name}: {len(corrupt)} of {chosen_count} images cannot be decoded: {keys}{more}; "
        "replace them, or leave them out with --skip-corrupt"
    )


def _hash_images(images: Iterable[tuple[str, str, str]]) -> str:
    total = hashlib.sha256()
    for image in images:
        total.update(json.dumps(image).encode() + b"\n")
    return total.hexdigest()
