"""A report's files put into its folder at once, when all are there, in place of those of the report before."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from lrrobust.errors import StoreError
from lrrobust.interrupts import interrupts_held_back
from lrrobust.results import write_file
from lrrobust.results.files import PREFIX, SUFFIX, explaining, keep_copy, read_file, remove_left

#: Lists what the last report wrote beside it, by name, with the sha256 of each file; of one that was killed while it put its
#: files into place, also the sha256 of the file before, behind a blank.
RECORD_NAME = ".written.json"


@dataclass
class Staged:
    """A report on its way.

    Attributes:
        folder: where its files are to be written.
        written: where they are, once they are in place.
        removed: files of the report before that are not in this one.
        kept: names that others' files got, of those in whose place something was put.
    """

    folder: Path
    written: list[Path] = field(default_factory=list)
    removed: list[Path] = field(default_factory=list)
    kept: list[Path] = field(default_factory=list)


@contextmanager
def staging(out: Path) -> Iterator[Staged]:
    """A folder to write a report into; at the end its files take the places of those of the last one in `out`.

    Where writing fails, or is interrupted, the last report stays as it is. What only it wrote is removed, as a figure of
    runs that left the report would else stand beside those of the report. A file that no report wrote, or that somebody
    changed since, is nobody's to remove: where one of its name is written, it is kept under the name FILE.old.

    Raises:
        StoreError: the folder, or a file in it, cannot be written or removed.
    """
    with explaining("write", out):
        out.mkdir(parents=True, exist_ok=True)
        remove_left(out.absolute())
        temporary = TemporaryDirectory(prefix=PREFIX, suffix=SUFFIX, dir=out)
    with temporary as name:
        staged = Staged(Path(name))
        yield staged
        before = _read_record(out)
        now = {path.name: _sha256(path) for path in sorted(staged.folder.iterdir())}
        changed = [out / file for file, sha256 in now.items() if _is_another(out / file, (*before.get(file, ()), sha256))]
        for place in changed:
            staged.kept.append(keep_copy(place))
        # From here on nothing is foreseen to fail, and whoever interrupts waits for a moment.
        with interrupts_held_back():
            # Whoever is killed meanwhile leaves files of both reports, and all of them are known.
            both = {**before, **{file: (sha256, *before.get(file, ())) for file, sha256 in now.items()}}
            _write_record(out, both)
            for file in now:
                with explaining("write", out / file):
                    os.replace(staged.folder / file, out / file)
                staged.written.append(out / file)
            for file, known in before.items():
                place = out / file
                # Names that differ in case alone may be of one file.
                if file in now or _sha256(place) not in known or any(place.samefile(other) for other in staged.written):
                    continue
                with explaining("remove", place):
                    place.unlink()
                staged.removed.append(place)
            _write_record(out, {file: (sha256,) for file, sha256 in now.items()})


def _is_another(place: Path, known: Sequence[str]) -> bool:
    """Whether what lies there is of somebody else; StoreError where nothing can take its place."""
    if place.is_dir() and not place.is_symlink():
        raise StoreError(f"{place} is a folder, where a file of the report is to go: move it away, or choose another --out")
    return place.exists() and _sha256(place) not in known


def _write_record(out_dir: Path, digests: Mapping[str, Iterable[str]]) -> None:
    record = {name: " ".join(dict.fromkeys(known)) for name, known in digests.items()}
    write_file(out_dir / RECORD_NAME, json.dumps(record, indent=2).encode() + b"\n")


def _read_record(out_dir: Path) -> Mapping[str, Sequence[str]]:
    """Names of files directly in the folder, each with the sha256 that it may have; nothing where the record is missing,
    damaged or says anything else."""
    try:
        record = json.loads(read_file(out_dir / RECORD_NAME))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(record, dict):
        return {}
    return {name: known.split() for name, known in record.items() if isinstance(known, str) and _is_file_name(name)}


def _is_file_name(name: str) -> bool:
    return name == Path(name).name and name not in ("", ".", "..", RECORD_NAME) and name.isprintable()


def _sha256(path: Path) -> str | None:
    """None for what is no regular file that can be read, such as a link."""
    try:
        return None if path.is_symlink() else hashlib.sha256(read_file(path)).hexdigest()
    except (OSError, ValueError):
        return None
