"""A few adversarial images of a run, kept for people to look at; nothing is computed from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from lrrobust.results.schema import schema_without_nulls

#: Bytes of perturbations that one attack may keep, and the images it then keeps at most.
_BUDGET_BYTES = 8_000_000
_MOST, _FEWEST = 64, 8

EXAMPLE_SCHEMA = schema_without_nulls(
    {
        "index": pa.int64(),
        "height": pa.int32(),
        "width": pa.int32(),
        "clean": pa.binary(),
    }
).append(pa.field("perturbation", pa.binary()))


@dataclass(frozen=True, eq=False)
class Example:
    """An image classified correctly when clean, and what one attack did to it.

    Args:
        index: of the image, as in the rows.
        clean: uint8 (H, W, 3); exact, as images are evaluated at multiples of 1/255.
        perturbation: float16 (H, W, 3) in pixel units of [0, 1]: what the nearest verified adversarial
            image adds; None when the attack found none. Rounded to 11 bits it serves for looking, not for
            measuring: the distances are in the rows.
    """

    index: int
    clean: np.ndarray
    perturbation: np.ndarray | None


def example_count(height: int, width: int) -> int:
    """How many images at the beginning of a subset are kept, if correct when clean: 64, fewer when large.

    >>> example_count(64, 64), example_count(224, 224), example_count(1024, 1024)
    (64, 26, 8)
    """
    return min(_MOST, max(_FEWEST, _BUDGET_BYTES // (height * width * 3 * 2)))


def examples_to_table(examples: Sequence[Example]) -> pa.Table:
    columns: dict[str, list[object]] = {name: [] for name in EXAMPLE_SCHEMA.names}
    for example in examples:
        height, width, _ = example.clean.shape
        if example.perturbation is not None and example.perturbation.shape != example.clean.shape:
            raise ValueError(f"image {example.index} is {example.clean.shape}, not {example.perturbation.shape=}")
        columns["index"].append(example.index)
        columns["height"].append(height)
        columns["width"].append(width)
        columns["clean"].append(example.clean.astype(np.uint8, casting="safe").tobytes())
        perturbation = example.perturbation
        columns["perturbation"].append(None if perturbation is None else perturbation.astype("<f2", casting="equiv").tobytes())
    return pa.table(columns, schema=EXAMPLE_SCHEMA)


def table_to_examples(table: pa.Table) -> list[Example]:
    """Raises ValueError where the table is none that `examples_to_table` makes."""
    examples = []
    for row in table.to_pylist():
        size = row["height"], row["width"]
        perturbation = None if row["perturbation"] is None else unpack_pixels(row["perturbation"], "<f2", *size)
        if perturbation is not None and not (abs(perturbation) <= 1).all():
            raise ValueError(f"the perturbation of image {row['index']} must lie in [-1, 1]")
        examples.append(Example(row["index"], unpack_pixels(row["clean"], "u1", *size), perturbation))
    return examples


def unpack_pixels(content: bytes, kind: str, height: int, width: int) -> np.ndarray:
    """Pixels (height, width, 3) of their bytes; raises ValueError where these are more, or fewer, or none."""
    pixels = np.frombuffer(content, kind)
    if height < 1 or width < 1 or pixels.size != height * width * 3:
        raise ValueError(f"expected {height} x {width} pixels of 3 values, found {pixels.size} values")
    return pixels.reshape(height, width, 3)
