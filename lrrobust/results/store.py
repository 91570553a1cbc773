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

import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa

from lrrobust.errors import StoreError
from lrrobust.results.adversarial import ADVERSARIAL_SCHEMA, AdversarialImage, adversarial_to_table
from lrrobust.results.examples import Example, examples_to_table
from lrrobust.results.files import explaining, write_file
from lrrobust.results.folder_lock import FolderLock
from lrrobust.results.leases import LEASES, Leases, clear_leases
from lrrobust.results.manifest import MANIFEST_NAME, load_manifest
from lrrobust.results.parts import (
    ADVERSARIAL,
    EXAMPLES,
    PARTS,
    DamagedPart,
    PartId,
    check_part,
    part_identity,
    part_path,
    read_part,
    read_rows,
    sealed_parquet,
)
from lrrobust.results.run import load_run
from lrrobust.results.schema import SCHEMA_VERSION

_log = logging.getLogger(__name__)

#: Keys of a manifest that tell sessions apart rather than runs.
_SESSION_KEYS = {"fingerprint", "provenance", "sessions"}


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
                another process, or cannot be written; a name in the manifest is not UTF-8.
            ValueError: `manifest` is not what it must be.
        """
        folder = Path(folder)
        # Through JSON, so that the manifest in memory is the one read back: tuples become lists.
        manifest = json.loads(json.dumps(manifest, allow_nan=False))
        _check_manifest(manifest)
        try:
            json.dumps(manifest, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            around = error.object[max(0, error.start - 20) : error.start + 20]
            raise StoreError(
                f"expected names in UTF-8 in what is to be evaluated, found one within {around!r}: rename what is meant"
            ) from None
        with explaining("write", folder):
            folder.mkdir(parents=True, exist_ok=True)
        lock = FolderLock(folder, is_shared=is_shared)
        try:
            # In this order, as another process may just be making first the manifest, then the folder of parts.
            has_parts = (folder / PARTS).exists()
            has_manifest = (folder / MANIFEST_NAME).exists()
            if has_parts and not has_manifest:
                raise StoreError(f"{folder} holds parts of a run but no {MANIFEST_NAME}: restore it, or choose another folder")
            manifest = _joined(folder, manifest) if has_manifest else {**manifest, "sessions": []}
            if lock.is_alone and has_manifest:
                _remove_stale_files(folder)
            # Of those that share a folder the first writes; all would where there are no locks, all the same but
            # for the session.
            if lock.is_alone or not (is_shared and has_manifest):
                write_file(folder / MANIFEST_NAME, json.dumps(manifest, indent=2).encode())
            with explaining("write", folder):
                (folder / PARTS).mkdir(exist_ok=True)
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

    def write_part(self, attack: str, start: int, stop: int, table: pa.Table, metadata: Mapping[str, str]) -> None:
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
        check_part(part, table)
        write_file(self._path(part), sealed_parquet(table, {**metadata, **part_identity(self.manifest, part)}))

    def write_examples(self, attack: str, start: int, stop: int, examples: Sequence[Example]) -> None:
        """Keep what one attack did to some images of a chunk; call it before `write_part`, which commits.

        Raises:
            StoreError: the disk is full or does not let us write.
            ValueError: images of one call differ in size.
        """
        self._write_images(PartId(attack, start, stop), EXAMPLES, examples_to_table(examples))

    def write_adversarial(self, attack: str, start: int, stop: int, images: Sequence[AdversarialImage]) -> None:
        """Keep the 8-bit adversarial images of a chunk; call it before `write_part`, which commits.

        Raises:
            StoreError: the disk is full or does not let us write.
            ValueError: an image and its clean one differ in size.
        """
        self._write_images(PartId(attack, start, stop), ADVERSARIAL, adversarial_to_table(images))

    def _write_images(self, part: PartId, kind: str, table: pa.Table) -> None:
        write_file(part_path(self.folder, part, kind), sealed_parquet(table, part_identity(self.manifest, part, kind)))

    def has_part(self, attack: str, start: int, stop: int) -> bool:
        """Whether the part is there, whole, and of this run.

        One that is damaged or belongs to another run is moved aside to `*.damaged`, with a warning in
        the log, so that it is computed again.
        """
        part = PartId(attack, start, stop)
        try:
            read_rows(self.folder, self.manifest, part)
        except FileNotFoundError:
            return False
        except DamagedPart as damage:
            self._move_aside(self._path(part), damage)
            return False
        return self.manifest.get("real_pixels") != "saved" or self._has_adversarial(part)

    def _has_adversarial(self, part: PartId) -> bool:
        """Whether the adversarial images of a part are there, which only computing it again can bring back."""
        path = part_path(self.folder, part, ADVERSARIAL)
        try:
            read_part(path, part_identity(self.manifest, part, ADVERSARIAL), ADVERSARIAL_SCHEMA)
        except FileNotFoundError:
            _log.warning("%s is missing: its part will be computed again", path)
            return False
        except DamagedPart as damage:
            self._move_aside(path, damage)
            return False
        return True

    def _move_aside(self, path: Path, damage: DamagedPart) -> None:
        aside = path.with_name(path.name + ".damaged")
        with explaining("write", aside):
            os.replace(path, aside)
        _log.warning("%s %s; moved to %s, it will be computed again", path, damage, aside.name)

    def present_parts(self) -> set[str]:
        """Stems of the files in the folder of parts; `has_part` looks whether one is a whole part."""
        with explaining("read", self.folder / PARTS):
            return {entry.name.removesuffix(".parquet") for entry in os.scandir(self.folder / PARTS)}

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
            return read_rows(self.folder, self.manifest, part)[0]
        except (FileNotFoundError, DamagedPart) as damage:
            raise StoreError(f"{self._path(part)} {damage}: it was whole a moment ago; run the same command again") from None

    def read_rows(self) -> pd.DataFrame:
        """All valid rows so far, as in `Run.rows`."""
        return load_run(self.folder).rows

    def _path(self, part: PartId) -> Path:
        return part_path(self.folder, part)


def _remove_stale_files(folder: Path) -> None:
    # Only called with the lock held, so their writers are dead.
    for where in (folder, folder / PARTS, folder / EXAMPLES, folder / ADVERSARIAL):
        for path in where.glob(".*.tmp"):
            if path.is_dir():
                continue  # of a report, which holds no lock
            with explaining("write", path):
                path.unlink(missing_ok=True)
    clear_leases(folder / LEASES)


def _check_manifest(manifest: Mapping[str, Any]) -> None:
    if manifest.get("schema_version") != SCHEMA_VERSION:
        raise ValueError(f"manifest needs schema_version {SCHEMA_VERSION}, got {manifest.get('schema_version')!r}")
    if not re.fullmatch(r"[0-9a-f]{8,}", str(manifest.get("fingerprint"))):
        raise ValueError(f"manifest needs a hexadecimal fingerprint, got {manifest.get('fingerprint')!r}")


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
