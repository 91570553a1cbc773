"""Runs as they are read from disk, finished or not."""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
import pyarrow as pa

from lrrobust.errors import StoreError
from lrrobust.results.adversarial import ADVERSARIAL_SCHEMA, AdversarialImage, table_to_adversarial
from lrrobust.results.examples import EXAMPLE_SCHEMA, Example, table_to_examples
from lrrobust.results.manifest import MANIFEST_NAME, load_manifest
from lrrobust.results.parts import (
    ADVERSARIAL,
    EXAMPLES,
    DamagedPart,
    PartId,
    foreign,
    listed_parts,
    part_identity,
    part_of,
    part_path,
    read_part,
    read_rows,
)
from lrrobust.results.schema import SCHEMA, check_values

T = TypeVar("T")

_log = logging.getLogger(__name__)


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


def load_run(folder: Path) -> Run:
    """Read a run, finished or not, without touching it: no lock, nothing written.

    Damaged parts are left out with a warning in the log; the run is then not complete. With a `plan`
    in the manifest, only planned parts are read.

    Raises:
        StoreError: there is no run, its manifest is damaged, or it cannot be read; its name is no text.
    """
    folder = Path(folder)
    try:
        folder.resolve().name.encode()
    except UnicodeEncodeError:
        raise StoreError(
            f"the name of the run in {str(folder)!r} is not UTF-8, as expected of runs: rename its folder"
        ) from None
    manifest = load_manifest(folder)
    planned = [PartId(*part) for part in manifest.get("plan", {}).get("parts", [])]
    order = {spec["name"]: place for place, spec in enumerate(manifest.get("attacks", []))}
    parts = sorted(
        planned or listed_parts(folder),
        key=lambda part: (order.get(part.attack, len(order)), part.attack, part.start),
    )
    read_parts, tables, metadata = [], [], {}
    ladders: dict[str, set[float]] = {}
    for part, read in zip(parts, _read_ahead(folder, manifest, parts)):
        path = part_path(folder, part)
        try:
            table, found = read()
        except FileNotFoundError:
            continue
        except DamagedPart as damage:
            _warn_damaged(path, damage)
            continue
        read_parts.append((part, table, found))
    for part, table, found in _with_sound_values(folder, read_parts):
        path = part_path(folder, part)
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
    parts = [part for part in sorted(listed_parts(run.folder, EXAMPLES)) if part.stem in run.part_metadata]
    for attack, found in _load_images(run, parts, EXAMPLES, EXAMPLE_SCHEMA, table_to_examples):
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
    parts = sorted(part for part in map(part_of, run.part_metadata) if part is not None)
    return _load_images(run, parts, ADVERSARIAL, ADVERSARIAL_SCHEMA, table_to_adversarial)


def _load_images(
    run: Run, parts: Iterable[PartId], kind: str, schema: pa.Schema, convert: Callable[[pa.Table], list[T]]
) -> Iterator[tuple[str, list[T]]]:
    for part in parts:
        path = part_path(run.folder, part, kind)
        try:
            images = convert(read_part(path, part_identity(run.manifest, part, kind), schema)[0])
        except (FileNotFoundError, DamagedPart, ValueError) as damage:
            reason = "is missing" if isinstance(damage, FileNotFoundError) else damage
            reason = foreign(reason) if type(reason) is ValueError else reason
            _log.warning("%s %s; its images are left out", path, reason)
            continue
        yield part.attack, images


def find_runs(root: Path) -> list[Path]:
    """The run folders at or below `root`, sorted; links to folders are followed, and each folder is taken once.

    A folder that cannot be listed is passed over with a warning in the log, as runs may lie in it.

    Raises:
        StoreError: `root` is not a folder.
    """
    root = Path(root)
    if not root.is_dir():
        raise StoreError(f"expected a folder of runs, found none at {root}: give the folder a run was written to")
    found, seen = [], set()
    # What lies here goes by its own name, whatever links lead there as well.
    ways = deque([os.fspath(root)])
    while ways:
        for folder, folders, files in os.walk(ways.popleft(), onerror=_warn_unlisted):
            place = os.path.realpath(folder)
            if place in seen:
                folders.clear()
                continue
            seen.add(place)
            if MANIFEST_NAME in files:
                found.append(Path(folder))
            ways.extend(path for name in folders if os.path.islink(path := os.path.join(folder, name)))
    return sorted(found)


def _warn_unlisted(error: OSError) -> None:
    _log.warning(
        "cannot look for runs in %s (%s): what lies there is left out; change its permissions, or move it away",
        error.filename,
        error.strerror,
    )


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


def group_runs(runs: Iterable[Run], *keys: str) -> dict[Any, list[Run]]:
    """By what their manifests say under nested keys, as `manifest_value`."""
    groups: dict[Any, list[Run]] = {}
    for run in runs:
        groups.setdefault(manifest_value(run, *keys), []).append(run)
    return groups


def _read_ahead(
    folder: Path, manifest: Mapping[str, Any], parts: Sequence[PartId]
) -> Iterator[Callable[[], tuple[pa.Table, dict[str, str]]]]:
    """For each part what gives `read_rows` of it, without its values checked, or its error.

    Two threads read, since half of it is not Python.
    """
    pool = ThreadPoolExecutor(2)
    try:
        futures = deque(pool.submit(read_rows, folder, manifest, part, with_values=False) for part in parts)
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
            _warn_damaged(part_path(folder, part), foreign(flaw))


def _flaw(table: pa.Table) -> ValueError | None:
    try:
        check_values(table)
    except ValueError as error:
        return error
    return None


def _warn_damaged(path: Path, damage: DamagedPart) -> None:
    _log.warning("%s %s; left out, run the same command again to compute it anew", path, damage)
