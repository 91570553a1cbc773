"""Images in Parquet files, as data sets on the Hugging Face hub are published: encoded, beside the number of their class."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lrrobust.data.file_trees import Spool, SpooledTree, most_unpacked_bytes
from lrrobust.data.ilsvrc import wnids_in
from lrrobust.data.layouts import LabelledFile, Labelling
from lrrobust.errors import DataError

SUFFIX = ".parquet"

#: Rows that are read at once.
_ROWS = 64


class ParquetTree(SpooledTree):
    """The images of one Parquet file, all of which are put into `spool`.

    A column holds them as bytes, or as a struct of `bytes` and `path`; another the numbers of their classes, whose names
    stand in the file's metadata, or these names themselves.

    Args:
        path: of the file.
        label_column: which column names the classes; None where there is but one, or one called "label".
        spool: takes the images.

    Attributes:
        labelling: the images and their classes, by name.

    Raises:
        DataError: the file cannot be read, is damaged, or does not say of every image which class it is of.
    """

    def __init__(self, path: Path, label_column: str | None, spool: Spool) -> None:
        super().__init__(path, (), spool)
        try:
            most = most_unpacked_bytes(path)
            with pq.ParquetFile(path) as file:
                schema = file.schema_arrow
                features = _read_features(schema)
                image_column = self._find_images(schema, features)
                column, classes = self._find_labels(schema, features, label_column)
                labels, paths = [], []
                for row, (label, encoded, image_path) in enumerate(_rows(file, image_column, column)):
                    labels.append(self._class_of(row, label, classes))
                    paths.append(image_path)
                    if encoded is None:
                        raise DataError(f"{path}: row {row} has no image in {image_column!r}; remove it, or take another file")
                    most -= len(encoded)
                    if most < 0:
                        raise DataError(f"{path} unpacks to far more than images do: download it anew")
                    self._put(_name(path, row), encoded)
        except (pa.ArrowException, ValueError, OSError) as error:
            if getattr(error, "errno", None) is not None:
                raise DataError(f"cannot read {path}: {error.strerror}") from error
            # pyarrow raises errors of the system's types for damaged content, too.
            reason = " ".join(str(error).split())[:200]
            raise DataError(f"{path} is damaged, cut short or no Parquet file ({reason}); copy or download it anew") from error
        self._names = {_name(path, row) for row in range(len(labels))}
        wnids = wnids_in([path or "" for path in paths], labels) or labels
        files = [LabelledFile(wnid, _name(path, row)) for row, wnid in enumerate(wnids)]
        self.labelling = Labelling(files, "", False, 0, Counter())

    def _find_images(self, schema: pa.Schema, features: Mapping[str, Any]) -> str:
        said = [name for name, feature in features.items() if feature.get("_type") == "Image" and name in schema.names]
        found = said or [field.name for field in schema if _holds_bytes(field.type)]
        if len(found) != 1:
            what = ", ".join(found) or f"none among {', '.join(schema.names[:8])}"
            raise DataError(f"{self.path}: expected one column of encoded images, found {what}")
        if not _holds_bytes(schema.field(found[0]).type):
            raise DataError(f"{self.path}: expected encoded images in {found[0]!r}, found {schema.field(found[0]).type}")
        return found[0]

    def _find_labels(
        self, schema: pa.Schema, features: Mapping[str, Any], asked: str | None
    ) -> tuple[str, Sequence[str] | None]:
        """The column of classes, and their names where it holds numbers."""
        named = {name: feature["names"] for name, feature in features.items() if _has_names(feature) and name in schema.names}
        texts = [field.name for field in schema if field.name in ("label", asked) and _is_text(field.type)]
        candidates = [*named, *texts]
        if asked is not None:
            candidates = [name for name in candidates if name == asked]
        elif "label" in candidates:
            candidates = ["label"]
        if len(candidates) == 1:
            return candidates[0], named.get(candidates[0])
        if candidates:
            example = f"{self.path.name}#{candidates[0]}"
            found = ", ".join(candidates)
            raise DataError(f"{self.path}: classes stand in {found}; name the column to take, as in '{example}'")
        what = "a column of classes" if asked is None else f"classes in a column {asked!r}"
        raise DataError(
            f"{self.path}: expected {what}, with their names in the file's metadata as on the Hugging Face hub, found columns "
            f"{', '.join(schema.names[:8])} without; sort the images into a folder for each class"
        )

    def _class_of(self, row: int, label: Any, classes: Sequence[str] | None) -> str:
        if classes is None:
            if isinstance(label, str) and label and "/" not in label:
                return label
        elif isinstance(label, int) and 0 <= label < len(classes):
            return classes[label]
        known = "a name" if classes is None else f"a number from 0 to {len(classes) - 1}"
        raise DataError(f"{self.path}: row {row} has no class: expected {known}, found {label!r}; take a split that has labels")


def _rows(file: pq.ParquetFile, image_column: str, label_column: str) -> Iterator[tuple[Any, bytes | None, str | None]]:
    """Label, encoded image and the path it had, row by row."""
    for batch in file.iter_batches(_ROWS, columns=[image_column, label_column], use_threads=False):
        images, labels = (batch.column(batch.schema.get_field_index(name)) for name in (image_column, label_column))
        for image, label in zip(images, labels.to_pylist(), strict=True):
            value = image.as_py()
            if isinstance(value, dict):
                yield label, value["bytes"], value.get("path")
            else:
                yield label, value, None


def _read_features(schema: pa.Schema) -> Mapping[str, Any]:
    """What the hub says of the columns; nothing where the file is from elsewhere."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return {}
    return {name: of for name, of in features.items() if isinstance(of, dict)} if isinstance(features, dict) else {}


def _has_names(feature: Mapping[str, Any]) -> bool:
    names = feature.get("names")
    is_list = isinstance(names, list) and all(isinstance(name, str) and name and "/" not in name for name in names)
    return feature.get("_type") == "ClassLabel" and is_list and len(set(names)) == len(names)


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        index = kind.get_field_index("bytes")
        return index >= 0 and _holds_bytes(kind.field(index).type)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _name(path: Path, row: int) -> str:
    return f"{path.stem}-{row:07d}"
