"""One file of a run: its name, what ties it to the run, and how it is sealed, read and checked."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from lrrobust.results.files import explaining, read_file
from lrrobust.results.manifest import ATTACK_NAME
from lrrobust.results.schema import SCHEMA, check_values

#: Folders of a run: rows, a few adversarial images to look at, all that outlast 8 bits.
PARTS, EXAMPLES, ADVERSARIAL = "parts", "examples", "adversarial"
_PART_STEM = re.compile(r"(?P<attack>.+)-(?P<start>\d{6,})-(?P<stop>\d{6,})")
_ATTACK_NAME = re.compile(ATTACK_NAME)

# Parquet checksums its pages at most, never its headers and footer. The seal covers every byte: it
# is the SHA-256 of the file with zeros in place of the digest itself.
_SEAL = b"lrrobust-part-sha256:"
_SEALED = re.compile(re.escape(_SEAL) + rb"([0-9a-f]{64})")
_UNSEALED = _SEAL + b"0" * 64

#: A part may unpack to no more (its two columns of images hold 2 GiB each at most), and is unpacked by so many rows.
_MOST_BYTES, _ROWS_AT_ONCE = 1 << 32, 4096


class PartId(NamedTuple):
    """Images `start` to `stop` - 1 of the evaluated subset, under one attack at all its eps."""

    attack: str
    start: int
    stop: int

    @property
    def stem(self) -> str:
        return f"{self.attack}-{self.start:06d}-{self.stop:06d}"


class DamagedPart(Exception):
    """A part that must not be used; the message completes a sentence that begins with its path."""


def part_path(folder: Path, part: PartId, kind: str = PARTS) -> Path:
    return folder / kind / f"{part.stem}.parquet"


def listed_parts(folder: Path, kind: str = PARTS) -> list[PartId]:
    parts = (part_of(path.stem) for path in (folder / kind).glob("*.parquet"))
    return [part for part in parts if part is not None]


def part_of(stem: str) -> PartId | None:
    """The part of a file's name without its ending."""
    name = _PART_STEM.fullmatch(stem)
    return name and PartId(name["attack"], int(name["start"]), int(name["stop"]))


def part_identity(manifest: Mapping[str, Any], part: PartId, kind: str = PARTS) -> dict[str, str]:
    """The metadata that ties a file to its run and name."""
    return {
        "fingerprint": manifest["fingerprint"],
        "schema_version": str(manifest["schema_version"]),
        "part": part.stem if kind == PARTS else f"{kind}/{part.stem}",
    }


def check_part(part: PartId, table: pa.Table) -> None:
    if not _ATTACK_NAME.fullmatch(part.attack):
        raise ValueError(f"attack names are made of letters, digits and _.+-, got {part.attack!r}")
    if not 0 <= part.start < part.stop:
        raise ValueError(f"a chunk needs 0 <= start < stop, got {part.start} and {part.stop}")
    if not table.schema.equals(SCHEMA):
        raise ValueError("a part needs a table made by rows_to_table, got another schema")
    attacks = table["attack"].unique().to_pylist()
    if attacks != [part.attack]:
        raise ValueError(f"part {part.stem} must hold rows of {part.attack!r} only, got {attacks}")
    images = len(table["index"].unique())
    if images != part.stop - part.start:
        raise ValueError(f"part {part.stem} must hold {part.stop - part.start} images, got {images}")
    # What a row says of its image it says at every eps.
    of_image = ["index", "key", "label", "wnid", "norm", "clean_prediction", "is_clean_correct"]
    of_images = table.group_by(of_image, use_threads=False)
    if of_images.aggregate([]).num_rows != images:
        raise ValueError(f"part {part.stem} says two things of the same image")
    rows = table.group_by(["index", "eps"], use_threads=False).aggregate([]).num_rows
    if rows != table.num_rows:
        raise ValueError(f"part {part.stem} has {table.num_rows - rows} rows twice for the same image and eps")
    if rows != images * len(table["eps"].unique()):
        raise ValueError(f"part {part.stem} must hold a row for every image and eps")


def sealed_parquet(table: pa.Table, metadata: Mapping[str, str]) -> bytes:
    buffer = pa.BufferOutputStream()
    with pq.ParquetWriter(buffer, table.schema) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({**metadata, "seal": _UNSEALED.decode()})
    content = buffer.getvalue().to_pybytes()
    if content.count(_UNSEALED) != 1:
        raise ValueError("metadata and rows must not contain the marker of the seal")
    return content.replace(_UNSEALED, _SEAL + _digest(content))


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).hexdigest().encode()


def read_rows(
    folder: Path, manifest: Mapping[str, Any], part: PartId, *, with_values: bool = True
) -> tuple[pa.Table, dict[str, str]]:
    """As `read_part`, for a part that must also hold the rows which its name promises.

    Args:
        with_values: check the values, too; `_with_sound_values` checks those of many parts at once.
    """
    table, metadata = read_part(part_path(folder, part), part_identity(manifest, part))
    try:
        if with_values:
            check_values(table)
        check_part(part, table)
    except ValueError as error:
        raise foreign(error) from None
    return table, metadata


def foreign(error: Exception) -> DamagedPart:
    return DamagedPart(f"holds what no evaluation writes ({' '.join(str(error).split())[:150]})")


def _bounded(file: pq.ParquetFile) -> Iterator[pa.RecordBatch]:
    """The rows of a file, of which a few bytes can say that they are billions."""
    size = 0
    # Parts are small: to share their columns out among threads takes longer than to read them.
    for batch in file.iter_batches(_ROWS_AT_ONCE, use_threads=False):
        size += batch.nbytes
        if size > _MOST_BYTES:
            raise DamagedPart(f"unpacks to more than {_MOST_BYTES:,} bytes")
        yield batch


def read_part(path: Path, identity: Mapping[str, str], schema: pa.Schema = SCHEMA) -> tuple[pa.Table, dict[str, str]]:
    """Rows and metadata of a part.

    Raises:
        FileNotFoundError: it is not there.
        DamagedPart: its bytes are not those written, or were written for another part or run.
    """
    with explaining("read", path):
        content = read_file(path)
    seals = _SEALED.findall(content)
    if len(seals) != 1 or _digest(content.replace(_SEAL + seals[0], _UNSEALED)) != seals[0]:
        raise DamagedPart("is truncated or damaged")
    # Anybody can seal: what follows trusts nothing that it finds.
    try:
        file = pq.ParquetFile(pa.BufferReader(content))
        metadata = {
            key.decode(): value.decode()
            for key, value in (file.metadata.metadata or {}).items()
            if key not in (b"ARROW:schema", b"seal")
        }
        for key, expected in identity.items():
            if metadata.pop(key, None) != expected:
                raise DamagedPart(f"was written for another {key.replace('_', ' ')}")
        if not file.schema_arrow.equals(schema):
            raise DamagedPart("has other columns than this version of lrrobust")
        table = pa.Table.from_batches(_bounded(file), file.schema_arrow)
        table.validate(full=True)
    except (pa.ArrowException, ValueError, OSError) as error:
        raise foreign(error) from None
    return table, metadata
