"""Adversarial images of a run as PNG files with a Parquet index, for any other program to read.

Files of an export:

    <folder>/index.parquet                      one row for each adversarial image
    <folder>/clean/<index>.png                  the clean images, as the model takes them
    <folder>/adversarial/<attack>/<index>.png   the adversarial ones
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from lrrobust.errors import StoreError
from lrrobust.norm import NORMS
from lrrobust.results import Run, load_adversarial, manifest_value, write_file
from lrrobust.results.files import read_file
from lrrobust.results.schema import schema_without_nulls

INDEX_NAME = "index.parquet"

INDEX_SCHEMA = schema_without_nulls(
    {
        "file": pa.string(),
        "sha256": pa.string(),
        "clean_file": pa.string(),
        "clean_sha256": pa.string(),
        "attack": pa.string(),
        "norm": pa.string(),
        "eps": pa.float64(),
        "index": pa.int64(),
        "key": pa.string(),
        "wnid": pa.string(),
        "label": pa.int32(),
        "prediction": pa.int32(),
        "linf_distance": pa.float64(),
        "l2_distance": pa.float64(),
        "l1_distance": pa.float64(),
    }
)

#: Key of the index' metadata under which the model, the surrogate, the data set and the run are named, as JSON.
_ABOUT = b"lrrobust"


@dataclass(frozen=True)
class Exported:
    """An export as its index describes it.

    Attributes:
        about: the manifest's `model`, `surrogate` (None in a white-box run), `dataset` and `fingerprint`; `is_complete`,
            whether the run was, and none of its images lost; and `rows_sha256`, a digest of the rows.
        rows: of `INDEX_SCHEMA`, in the order of attacks and images.
    """

    folder: Path
    about: Mapping[str, Any]
    rows: tuple[dict[str, Any], ...]


def export_adversarial(run: Run, folder: Path) -> Exported:
    """Writes the 8-bit adversarial images that a run kept, with their clean images and an index.

    Args:
        run: made with `--save-adversarial`.
        folder: created where missing; an index of the same run in it is replaced once all images are written.

    Raises:
        StoreError: the run kept no images, the folder holds those of another run, or files cannot be read or written.
    """
    if run.manifest.get("real_pixels") != "saved":
        raise StoreError(f"{run.folder} kept no adversarial images: evaluate again with --save-adversarial")
    folder, rows = Path(folder), []
    # A damaged index is what exporting again mends.
    with suppress(_NoIndex):
        if _read_index(folder).about.get("fingerprint") != run.manifest["fingerprint"]:
            raise StoreError(f"{folder} holds the images of another run, which would be mixed with these: give another --out")
    clean_hashes: dict[int, str] = {}
    part_count = 0
    for attack, images in load_adversarial(run):
        part_count += 1
        for image in images:
            file, clean_file = f"adversarial/{attack}/{image.index:06d}.png", f"clean/{image.index:06d}.png"
            if image.index not in clean_hashes:
                clean_hashes[image.index] = _write_png(folder / clean_file, image.clean)
            fields = {key: value for key, value in asdict(image).items() if key in INDEX_SCHEMA.names}
            hashes = {"sha256": _write_png(folder / file, image.adversarial), "clean_sha256": clean_hashes[image.index]}
            rows.append({"file": file, "clean_file": clean_file, "attack": attack, **fields, **hashes})
    about = {"model": manifest_value(run, "model"), "surrogate": run.manifest.get("surrogate")}
    about |= {"dataset": manifest_value(run, "dataset"), "fingerprint": run.manifest["fingerprint"]}
    is_complete = run.is_complete and part_count == len(run.part_metadata)
    about |= {"is_complete": is_complete, "rows_sha256": _rows_sha256(rows)}
    buffer = pa.BufferOutputStream()
    metadata = {_ABOUT: json.dumps(about).encode()}
    pq.write_table(pa.Table.from_pylist(rows, schema=INDEX_SCHEMA.with_metadata(metadata)), buffer)
    write_file(folder / INDEX_NAME, buffer.getvalue().to_pybytes())
    return Exported(folder, about, tuple(rows))


def open_export(folder: Path) -> Exported:
    """Reads the index of an export.

    Raises:
        StoreError: there is none, or it is damaged, or says other things than when it was written.
    """
    try:
        return _read_index(Path(folder))
    except _NoIndex as error:
        raise StoreError(str(error)) from None


class _NoIndex(Exception):
    """The index of an export is missing or damaged; says so in one line."""


def _read_index(folder: Path) -> Exported:
    path = folder / INDEX_NAME
    try:
        table = pq.read_table(pa.BufferReader(read_file(path)))
        if _ABOUT not in (table.schema.metadata or {}):
            raise ValueError("it does not say of which run it is")
        about = json.loads(table.schema.metadata[_ABOUT])
        if not table.schema.remove_metadata().equals(INDEX_SCHEMA):
            raise ValueError("it has other columns")
        rows = table.to_pylist()
        if about["rows_sha256"] != _rows_sha256(rows):
            raise ValueError("its rows are not those that were written")
        # Anybody can compute a digest: what follows trusts nothing that it finds.
        if not isinstance(about["model"]["name"], str) or not isinstance(about["is_complete"], bool):
            raise ValueError("it names no model")
        for row in rows:
            if row["norm"] not in NORMS or not row["eps"] >= 0 or "\0" in row["file"] + row["clean_file"]:
                raise ValueError(f"no image can be as it says of {row['file']!r}")
    except FileNotFoundError:
        raise _NoIndex(f"expected exported images in {folder}, found no {INDEX_NAME}: run `lrrobust export` first") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:150]
        raise _NoIndex(f"{path} is not the index of an export ({reason}): export the run again") from None
    return Exported(folder, about, tuple(rows))


def read_pairs(export: Exported) -> Iterator[tuple[dict[str, Any], np.ndarray, np.ndarray]]:
    """Each row of the index with its clean and its adversarial image, uint8 (H, W, 3), read from their files.

    Raises:
        StoreError: a file is missing, damaged, or another one than was written.
    """
    for row in export.rows:
        clean = _read_png(export.folder, row["clean_file"], row["clean_sha256"])
        adversarial = _read_png(export.folder, row["file"], row["sha256"])
        if clean.shape != adversarial.shape:
            sizes = f"{adversarial.shape[:2]}, not {clean.shape[:2]} as its clean image"
            raise StoreError(f"{export.folder / row['file']} is of size {sizes}")
        yield row, clean, adversarial


def _rows_sha256(rows: Sequence[Mapping[str, Any]]) -> str:
    of_schema = [[row[name] for name in INDEX_SCHEMA.names] for row in rows]
    return hashlib.sha256(json.dumps(of_schema).encode()).hexdigest()


def _write_png(path: Path, pixels: np.ndarray) -> str:
    """Writes uint8 (H, W, 3); sha256 of the file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    write_file(path, buffer.getvalue())
    return hashlib.sha256(buffer.getvalue()).hexdigest()


def _read_png(folder: Path, file: str, sha256: str) -> np.ndarray:
    # The index may come from anywhere: it names files below its own folder only.
    if PurePosixPath(file).is_absolute() or ".." in PurePosixPath(file).parts:
        raise StoreError(f"{folder / INDEX_NAME} names {file!r}, which lies outside {folder}")
    try:
        content = read_file(folder / file)
    except OSError as error:
        raise StoreError(f"{folder / file} cannot be read ({error.strerror}): export the run again") from None
    if hashlib.sha256(content).hexdigest() != sha256:
        raise StoreError(f"{folder / file} is not the file that the index describes: export the run again")
    try:
        with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
            return np.array(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise StoreError(f"{folder / file} is no PNG file ({' '.join(str(error).split())[:100]})") from None
