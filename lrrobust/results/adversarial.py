"""Adversarial images of a run in 8 bits, as they would be saved: exact, verified after the rounding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import pyarrow as pa

from lrrobust.results.examples import unpack_pixels
from lrrobust.results.schema import schema_without_nulls

ADVERSARIAL_SCHEMA = schema_without_nulls(
    {
        "index": pa.int64(),
        "key": pa.string(),
        "wnid": pa.string(),
        "label": pa.int32(),
        "prediction": pa.int32(),
        "norm": pa.string(),
        "eps": pa.float64(),
        "linf_distance": pa.float64(),
        "l2_distance": pa.float64(),
        "l1_distance": pa.float64(),
        "height": pa.int32(),
        "width": pa.int32(),
        "clean": pa.binary(),
        "adversarial": pa.binary(),
    }
)


@dataclass(frozen=True, eq=False)
class AdversarialImage:
    """An 8-bit image that a model misclassifies, and the clean one that it classifies correctly.

    Args:
        index, key, wnid, label: of the image, as in the rows.
        prediction: class number for the adversarial image.
        norm: of the attack.
        eps: smallest budget of the attack's ladder at which the image counts; infinity for one of a minimal-norm attack
            that lies beyond all of them.
        linf_distance, l2_distance, l1_distance: of both images, pixel units of [0, 1].
        clean, adversarial: uint8 (H, W, 3), as the model takes them; k stands for the value k / 255.
    """

    index: int
    key: str
    wnid: str
    label: int
    prediction: int
    norm: str
    eps: float
    linf_distance: float
    l2_distance: float
    l1_distance: float
    clean: np.ndarray
    adversarial: np.ndarray


def adversarial_to_table(images: Sequence[AdversarialImage]) -> pa.Table:
    rows = []
    for image in images:
        if image.clean.shape != image.adversarial.shape:
            raise ValueError(f"image {image.index}: {image.clean.shape=} is not {image.adversarial.shape=}")
        height, width, _ = image.clean.shape
        pixels = {name: getattr(image, name).astype(np.uint8, casting="safe").tobytes() for name in ("clean", "adversarial")}
        rows.append({**asdict(image), "height": height, "width": width, **pixels})
    return pa.Table.from_pylist(rows, schema=ADVERSARIAL_SCHEMA)


def table_to_adversarial(table: pa.Table) -> list[AdversarialImage]:
    """Raises ValueError where the table is none that `adversarial_to_table` makes."""
    images = []
    for row in table.to_pylist():
        size = row.pop("height"), row.pop("width")
        pixels = {name: unpack_pixels(row[name], "u1", *size) for name in ("clean", "adversarial")}
        images.append(AdversarialImage(**{**row, **pixels}))
    return images
