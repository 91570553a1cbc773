"""The folder of a run: a manifest, and one Parquet part for each attack and chunk of images.

    <folder>/manifest.json                                what is evaluated, and its fingerprint
    <folder>/parts/<attack>-<start>-<stop>.parquet        the rows of images start to stop - 1
    <folder>/examples/<attack>-<start>-<stop>.parquet     a few of their adversarial images, to look at
    <folder>/adversarial/<attack>-<start>-<stop>.parquet  all that outlast 8 bits, where that was asked for
    <folder>/leases/<attack>-<start>-<stop>               which parts are being computed, where processes share a run

A part appears under its name complete or not at all (temporary file, fsync, rename), so its
existence is the commit, and resuming means computing the parts that are not there.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from lrrobust.errors import StoreError
from lrrobust.results.adversarial import ADVERSARIAL_SCHEMA, AdversarialImage, adversarial_to_table, table_to_adversarial
from lrrobust.results.examples import EXAMPLE_SCHEMA, Example, examples_to_table, table_to_examples
from lrrobust.results.files import explaining, read_file, write_file
from lrrobust.results.folder_lock import FolderLock
from lrrobust.results.leases import LEASES, Leases, clear_leases
from lrrobust.results.manifest import ATTACK_NAME, identity_of, parse_manifest
from lrrobust.results.schema import SCHEMA, SCHEMA_VERSION, check_values

T = TypeVar("T")

_log = logging.getLogger(__name__)

_MANIFEST = "manifest.json"
_PARTS, _EXAMPLES, _ADVERSARIAL = "parts", "examples", "adversarial"
_PART_STEM = re.compile(r"(?P<attack>.+)-(?P<start>\d{6,})-(?P<stop>\d{6,})")
_ATTACK_NAME = re.compile(ATTACK_NAME)

# Parquet checksums its pages at most, never its headers and footer. The seal covers every byte: it
# is the SHA-256 of the file with zeros in place of the digest itself.
_SEAL = b"lrrobust-part-sha256:"
_SEALED = re.compile(re.escape(_SEAL) + rb"([0-9a-f]{64})")
_UNSEALED = _SEAL + b"0" * 64

#: A part may unpack to no more (its two columns of images hold 2 GiB each at most), and is unpacked by so many rows.
_MOST_BYTES, _ROWS_AT_ONCE = 1 << 32, 4096

#: Keys of a manifest that tell sessions apart rather than runs.
_SESSION_KEYS = {"fingerprint", "provenance", "sessions"}


class PartId(NamedTuple):
    """Images `start` to `stop` - 1 of the evaluated subset, under one attack at all its eps."""

    attack: str
    start: int
    stop: int

    @property
    def stem(self) -> str:
        return f"{self.attack}-{self.start:06d}-{self.stop:06d}"


@dataclass(frozen=True, eq=False)
class Run:
    """A run as read from disk; not to be changed, as what is derived from one may be kept beside it.

    Args:
        folder: where it lies.
        manifest: what was evaluated.
        rows: the columns of `SCHEMA` in Arrow-backed dtypes, so that null and NaN stay apart; ordered
            by attack as in the manifest, then by chunk.
        is_complete: every part of the manifest's plan is there and valid.
        part_metadata: for each part read, by its file's stem, what `write_part` was given.
    """

    folder: Path
    manifest: dict[str, Any]
    rows: pd.DataFrame
    is_complete: bool
    part_metadata: dict[str, dict[str, str]]


class RunStore:
    """A run folder opened for writing, by one process or by several that share its work.

    Build it with `create_or_resume`. It is a context manager; the lock goes with `close`, with the
    object, or with the process, however that ends.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any], lock: FolderLock) -> None:
        self.folder = folder
        self.manifest = manifest
        self._lock = lock

    @classmethod
    def create_or_resume(cls, folder: Path, manifest: Mapping[str, Any], *, is_shared: bool = False) -> RunStore:
        """Open `folder` for the run described by `manifest`, new or begun before.

        Args:
            folder: created with its parents where missing.
            manifest: plain JSON (no NaN or infinity) with at least `schema_version` and the
                hexadecimal `fingerprint` of everything that decides the results. When the folder
                holds a run of the same fingerprint, its manifest stays, and
                `{"started_at", "provenance"}` of this session joins its list `sessions`.
            is_shared: whether other processes that say the same may have it open as well. The first of
                them writes the manifest; `leases` tell who does what.

        Raises:
            StoreError: the folder holds another run or a damaged manifest, is being written by
                another process, or cannot be written.
            ValueError: `manifest` is not what it must be.
        """
        folder = Path(folder)
        # Through JSON, so that the manifest in memory is the one read back: tuples become lists.
        manifest = json.loads(json.dumps(manifest, allow_nan=False))
        _check_manifest(manifest)
        with explaining("write", folder):
            folder.mkdir(parents=True, exist_ok=True)
        lock = FolderLock(folder, is_shared=is_shared)
        try:
            # In this order, as another process may just be making first the manifest, then the folder of parts.
            has_parts = (folder / _PARTS).exists()
            has_manifest = (folder / _MANIFEST).exists()
            if has_parts and not has_manifest:
                raise StoreError(
                    f"{folder} holds parts of a run but no {_MANIFEST}: restore it, or choose another folder"
                )
            manifest = _joined(folder, manifest) if has_manifest else {**manifest, "sessions": []}
            if lock.is_alone and has_manifest:
                _remove_stale_files(folder)
            # Of those that share a folder the first writes; all would where there are no locks, all the same but for the session.
            if lock.is_alone or not (is_shared and has_manifest):
                write_file(folder / _MANIFEST, json.dumps(manifest, indent=2).encode())
            with explaining("write", folder):
                (folder / _PARTS).mkdir(exist_ok=True)
            if is_shared:
                lock.share()
        except BaseException:
            lock.close()
            raise
        return cls(folder, manifest, lock)

    def __enter__(self) -> RunStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let other processes write to the folder. Closing twice does no harm."""
        self._lock.close()

    def write_part(
        self, attack: str, start: int, stop: int, table: pa.Table, metadata: Mapping[str, str]
    ) -> None:
        """Commit the rows of one chunk; they survive a crash or power cut once this returns.

        Args:
            attack: name of the attack: letters, digits and `_ . + -`, not beginning with `. + -`.
            start, stop: the chunk, 0 <= start < stop.
            table: made by `rows_to_table`; all `stop - start` images of the chunk, under this attack.
            metadata: what these rows were computed on (device, threads, versions). Reports point out
                values that differ between parts, so no times here. The fingerprint is added.

        Raises:
            StoreError: the disk is full or does not let us write; earlier parts are kept.
            ValueError: the table is not that chunk.
        """
        part = PartId(attack, start, stop)
        _check_part(part, table)
        write_file(self._path(part), _sealed_parquet(table, {**metadata, **self._identity(part)}))

    def write_examples(self, attack: str, start: int, stop: int, examples: Sequence[Example]) -> None:
        """Keep what one attack did to some images of a chunk; call it before `write_part`, which commits.

        Raises:
            StoreError: the disk is full or does not let us write.
            ValueError: images of one call differ in size.
        """
        self._write_images(PartId(attack, start, stop), _EXAMPLES, examples_to_table(examples))

    def write_adversarial(self, attack: str, start: int, stop: int, images: Sequence[AdversarialImage]) -> None:
        """Keep the 8-bit adversarial images of a chunk; call it before `write_part`, which commits.

        Raises:
            StoreError: the disk is full or does not let us write.
            ValueError: an image and its clean one differ in size.
        """
        self._write_images(PartId(attack, start, stop), _ADVERSARIAL, adversarial_to_table(images))

    def _write_images(self, part: PartId, kind: str, table: pa.Table) -> None:
        write_file(_part_path(self.folder, part, kind), _sealed_parquet(table, _identity(self.manifest, part, kind)))

    def has_part(self, attack: str, start: int, stop: int) -> bool:
        """Whether the part is there, whole, and of this run.

        One that is damaged or belongs to another run is moved aside to `*.damaged`, with a warning in
        the log, so that it is computed again.
        """
        part = PartId(attack, start, stop)
        try:
            _read_rows(self.folder, self.manifest, part)
        except FileNotFoundError:
            return False
        except _DamagedPart as damage:
            self._move_aside(self._path(part), damage)
            return False
        return self.manifest.get("real_pixels") != "saved" or self._has_adversarial(part)

    def _has_adversarial(self, part: PartId) -> bool:
        """Whether the adversarial images of a part are there, which only computing it again can bring back."""
        path = _part_path(self.folder, part, _ADVERSARIAL)
        try:
            _read_part(path, _identity(self.manifest, part, _ADVERSARIAL), ADVERSARIAL_SCHEMA)
        except FileNotFoundError:
            _log.warning("%s is missing: its part will be computed again", path)
            return False
        except _DamagedPart as damage:
            self._move_aside(path, damage)
            return False
        return True

    def _move_aside(self, path: Path, damage: _DamagedPart) -> None:
        aside = path.with_name(path.name + ".damaged")
        with explaining("write", aside):
            os.replace(path, aside)
        _log.warning("%s %s; moved to %s, it will be computed again", path, damage, aside.name)

    def present_parts(self) -> set[str]:
        """Stems of the files in the folder of parts; `has_part` looks whether one is a whole part."""
        with explaining("read", self.folder / _PARTS):
            return {entry.name.removesuffix(".parquet") for entry in os.scandir(self.folder / _PARTS)}

    def leases(self, lease_s: float) -> Leases:
        """What tells the processes that share this run which parts the others are at."""
        return Leases(self.folder / LEASES, lease_s)

    def read_part(self, attack: str, start: int, stop: int) -> pa.Table:
        """The rows of a part that `has_part` has just found.

        Raises:
            StoreError: it cannot be read any more.
        """
        part = PartId(attack, start, stop)
        try:
            return _read_rows(self.folder, self.manifest, part)[0]
        except (FileNotFoundError, _DamagedPart) as damage:
            raise StoreError(f"{self._path(part)} {damage}: it was whole a moment ago; run the same command again") from None

    def read_rows(self) -> pd.DataFrame:
        """All valid rows so far, as in `Run.rows`."""
        return load_run(self.folder).rows

    def _path(self, part: PartId) -> Path:
        return _part_path(self.folder, part)

    def _identity(self, part: PartId) -> dict[str, str]:
        return _identity(self.manifest, part)


def load_run(folder: Path) -> Run:
    """Read a run, finished or not, without touching it: no lock, nothing written.

    Damaged parts are left out with a warning in the log; the run is then not complete. With a `plan`
    in the manifest, only planned parts are read.

    Raises:
        StoreError: there is no run, its manifest is damaged, or it cannot be read.
    """
    folder = Path(folder)
    manifest = load_manifest(folder)
    planned = [PartId(*part) for part in manifest.get("plan", {}).get("parts", [])]
    order = {spec["name"]: place for place, spec in enumerate(manifest.get("attacks", []))}
    parts = sorted(
        planned or _listed_parts(folder),
        key=lambda part: (order.get(part.attack, len(order)), part.attack, part.start),
    )
    read_parts, tables, metadata = [], [], {}
    ladders: dict[str, set[float]] = {}
    for part, read in zip(parts, _read_ahead(folder, manifest, parts)):
        path = _part_path(folder, part)
        try:
            table, found = read()
        except FileNotFoundError:
            continue
        except _DamagedPart as damage:
            _warn_damaged(path, damage)
            continue
        read_parts.append((part, table, found))
    for part, table, found in _with_sound_values(folder, read_parts):
        path = _part_path(folder, part)
        eps = set(table["eps"].unique().to_pylist())
        if eps != ladders.setdefault(part.attack, eps):
            _log.warning("%s holds other eps than the parts before it; left out", path)
            continue
        tables.append(table)
        metadata[part.stem] = found
    rows = pa.concat_tables(tables) if tables else SCHEMA.empty_table()
    return Run(
        folder=folder,
        manifest=manifest,
        rows=rows.to_pandas(types_mapper=pd.ArrowDtype),
        is_complete=bool(planned) and len(metadata) == len(planned),
        part_metadata=metadata,
    )


def load_examples(run: Run) -> dict[str, list[Example]]:
    """Attack -> the examples that the run kept of it, ordered by image; nothing for runs that kept none.

    Damaged files are left out with a warning in the log.

    Raises:
        StoreError: a file is there and cannot be read.
    """
    examples: dict[str, list[Example]] = {}
    # Images are written before the rows that they belong to, and are nothing without those.
    parts = [part for part in sorted(_listed_parts(run.folder, _EXAMPLES)) if part.stem in run.part_metadata]
    for attack, found in _load_images(run, parts, _EXAMPLES, EXAMPLE_SCHEMA, table_to_examples):
        examples.setdefault(attack, []).extend(found)
    return {attack: sorted(found, key=lambda example: example.index) for attack, found in examples.items()}


def load_adversarial(run: Run) -> Iterator[tuple[str, list[AdversarialImage]]]:
    """The 8-bit adversarial images that the run kept: attack and images, chunk by chunk; nothing where it kept none.

    One pair for each part of the run, but for those whose file is missing or damaged: these are left out with a
    warning in the log.

    Raises:
        StoreError: a file is there and cannot be read.
    """
    if run.manifest.get("real_pixels") != "saved":
        return iter(())
    parts = sorted(part for part in map(_part_of, run.part_metadata) if part is not None)
    return _load_images(run, parts, _ADVERSARIAL, ADVERSARIAL_SCHEMA, table_to_adversarial)


def _load_images(
    run: Run, parts: Iterable[PartId], kind: str, schema: pa.Schema, convert: Callable[[pa.Table], list[T]]
) -> Iterator[tuple[str, list[T]]]:
    for part in parts:
        path = _part_path(run.folder, part, kind)
        try:
            images = convert(_read_part(path, _identity(run.manifest, part, kind), schema)[0])
        except (FileNotFoundError, _DamagedPart, ValueError) as damage:
            reason = "is missing" if isinstance(damage, FileNotFoundError) else damage
            reason = _foreign(reason) if type(reason) is ValueError else reason
            _log.warning("%s %s; its images are left out", path, reason)
            continue
        yield part.attack, images


def find_runs(root: Path) -> list[Path]:
    """The run folders at or below `root`, sorted.

    Raises:
        StoreError: `root` is not a folder.
    """
    root = Path(root)
    if not root.is_dir():
        raise StoreError(f"expected a folder of runs, found none at {root}: give the folder a run was written to")
    with explaining("read", root):
        return sorted(path.parent for path in root.rglob(_MANIFEST))


def fingerprint_of(identity: dict[str, Any]) -> str:
    """sha256 of a JSON-ready identity, independent of the order of its keys."""
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


class _DamagedPart(Exception):
    """A part that must not be used; the message completes a sentence that begins with its path."""


def _remove_stale_files(folder: Path) -> None:
    # Only called with the lock held, so their writers are dead.
    for where in (folder, folder / _PARTS, folder / _EXAMPLES, folder / _ADVERSARIAL):
        for path in where.glob(".*.tmp"):
            with explaining("write", path):
                path.unlink(missing_ok=True)
    clear_leases(folder / LEASES)


def _check_manifest(manifest: Mapping[str, Any]) -> None:
    if manifest.get("schema_version") != SCHEMA_VERSION:
        raise ValueError(f"manifest needs schema_version {SCHEMA_VERSION}, got {manifest.get('schema_version')!r}")
    if not re.fullmatch(r"[0-9a-f]{8,}", str(manifest.get("fingerprint"))):
        raise ValueError(f"manifest needs a hexadecimal fingerprint, got {manifest.get('fingerprint')!r}")


def load_manifest(folder: Path) -> dict[str, Any]:
    """What a run says of itself; StoreError where there is none, or it is damaged."""
    path = folder / _MANIFEST
    try:
        with explaining("read", path):
            manifest = parse_manifest(read_file(path))
    except FileNotFoundError:
        raise StoreError(f"expected a run in {folder}, found no {_MANIFEST}: give the folder of a run") from None
    except ValueError as error:
        raise StoreError(
            f"{path} is damaged ({error}); restore it from a copy, or choose another folder to start anew"
        ) from None
    if manifest["schema_version"] != SCHEMA_VERSION:
        raise StoreError(
            f"{folder} has results of schema {manifest['schema_version']}, this lrrobust reads {SCHEMA_VERSION}: "
            "use the version of lrrobust that wrote it, or choose another folder"
        )
    # Others than evaluations choose their fingerprints themselves.
    if "rows_version" in manifest and manifest["fingerprint"] != fingerprint_of(identity_of(manifest)):
        raise StoreError(
            f"{path} was edited: what it says does not have the fingerprint that it names; restore it from a copy, or evaluate anew "
            "in another folder"
        )
    return manifest


def _joined(folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest in `folder`, with the session that `manifest` describes added."""
    old = load_manifest(folder)
    if old["fingerprint"] != manifest["fingerprint"]:
        keys = sorted((set(old) | set(manifest)) - _SESSION_KEYS)
        differing = [key for key in keys if old.get(key) != manifest.get(key)]
        raise StoreError(
            f"{folder} holds another run (fingerprint {old['fingerprint'][:12]}, not {manifest['fingerprint'][:12]}; "
            f"differing: {', '.join(differing) or 'nothing the manifest shows'}); "
            "choose another folder, or repeat the settings of that run to resume it"
        )
    session = {
        "started_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "provenance": manifest.get("provenance"),
    }
    return {**old, "sessions": [*old.get("sessions", []), session]}


def _part_path(folder: Path, part: PartId, kind: str = _PARTS) -> Path:
    return folder / kind / f"{part.stem}.parquet"


def _listed_parts(folder: Path, kind: str = _PARTS) -> list[PartId]:
    parts = (_part_of(path.stem) for path in (folder / kind).glob("*.parquet"))
    return [part for part in parts if part is not None]


def _part_of(stem: str) -> PartId | None:
    """The part of a file's name without its ending."""
    name = _PART_STEM.fullmatch(stem)
    return name and PartId(name["attack"], int(name["start"]), int(name["stop"]))


def _identity(manifest: Mapping[str, Any], part: PartId, kind: str = _PARTS) -> dict[str, str]:
    """The metadata that ties a file to its run and name."""
    return {
        "fingerprint": manifest["fingerprint"],
        "schema_version": str(manifest["schema_version"]),
        "part": part.stem if kind == _PARTS else f"{kind}/{part.stem}",
    }


def _check_part(part: PartId, table: pa.Table) -> None:
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


def _sealed_parquet(table: pa.Table, metadata: Mapping[str, str]) -> bytes:
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


def _read_rows(
    folder: Path, manifest: Mapping[str, Any], part: PartId, *, with_values: bool = True
) -> tuple[pa.Table, dict[str, str]]:
    """As `_read_part`, for a part that must also hold the rows which its name promises.

    Args:
        with_values: check the values, too; `_with_sound_values` checks those of many parts at once.
    """
    table, metadata = _read_part(_part_path(folder, part), _identity(manifest, part))
    try:
        if with_values:
            check_values(table)
        _check_part(part, table)
    except ValueError as error:
        raise _foreign(error) from None
    return table, metadata


def _read_ahead(
    folder: Path, manifest: Mapping[str, Any], parts: Sequence[PartId]
) -> Iterator[Callable[[], tuple[pa.Table, dict[str, str]]]]:
    """For each part what gives `_read_rows` of it, without its values checked, or its error.

    Two threads read, since half of it is not Python.
    """
    pool = ThreadPoolExecutor(2)
    try:
        futures = deque(pool.submit(_read_rows, folder, manifest, part, with_values=False) for part in parts)
        while futures:
            yield futures.popleft().result
    finally:
        # Whoever is interrupted does not wait for all that was ahead.
        pool.shutdown(cancel_futures=True)


_ReadPart = tuple[PartId, pa.Table, dict[str, str]]


def _with_sound_values(folder: Path, parts: Sequence[_ReadPart]) -> Iterator[_ReadPart]:
    """All parts as one table in a fraction of the time; one by one only where something is wrong, to say where."""
    if not parts or _flaw(pa.concat_tables([table for _, table, _ in parts])) is None:
        yield from parts
        return
    for part, table, found in parts:
        if (flaw := _flaw(table)) is None:
            yield part, table, found
        else:
            _warn_damaged(_part_path(folder, part), _foreign(flaw))


def _flaw(table: pa.Table) -> ValueError | None:
    try:
        check_values(table)
    except ValueError as error:
        return error
    return None


def _warn_damaged(path: Path, damage: _DamagedPart) -> None:
    _log.warning("%s %s; left out, run the same command again to compute it anew", path, damage)


def _foreign(error: Exception) -> _DamagedPart:
    return _DamagedPart(f"holds what no evaluation writes ({' '.join(str(error).split())[:150]})")


def _bounded(file: pq.ParquetFile) -> Iterator[pa.RecordBatch]:
    """The rows of a file, of which a few bytes can say that they are billions."""
    size = 0
    # Parts are small: to share their columns out among threads takes longer than to read them.
    for batch in file.iter_batches(_ROWS_AT_ONCE, use_threads=False):
        size += batch.nbytes
        if size > _MOST_BYTES:
            raise _DamagedPart(f"unpacks to more than {_MOST_BYTES:,} bytes")
        yield batch


def _read_part(
    path: Path, identity: Mapping[str, str], schema: pa.Schema = SCHEMA
) -> tuple[pa.Table, dict[str, str]]:
    """Rows and metadata of a part.

    Raises:
        FileNotFoundError: it is not there.
        _DamagedPart: its bytes are not those written, or were written for another part or run.
    """
    with explaining("read", path):
        content = read_file(path)
    seals = _SEALED.findall(content)
    if len(seals) != 1 or _digest(content.replace(_SEAL + seals[0], _UNSEALED)) != seals[0]:
        raise _DamagedPart("is truncated or damaged")
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
                raise _DamagedPart(f"was written for another {key.replace('_', ' ')}")
        if not file.schema_arrow.equals(schema):
            raise _DamagedPart("has other columns than this version of lrrobust")
        table = pa.Table.from_batches(_bounded(file), file.schema_arrow)
        table.validate(full=True)
    except (pa.ArrowException, ValueError, OSError) as error:
        raise _foreign(error) from None
    return table, metadata


def manifest_value(run: Run, *keys: str) -> Any:
    """What the manifest says under nested keys.

    Raises:
        StoreError: it does not.
    """
    value: Any = run.manifest
    for key in keys:
        if not isinstance(value, Mapping) or key not in value:
            raise StoreError(
                f"{run.folder}/manifest.json must hold {'.'.join(keys)}, found none: "
                "restore it, or evaluate anew in another folder"
            )
        value = value[key]
    return value
