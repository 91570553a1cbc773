"""What earlier reports left in a folder: figures and tables of runs that are no longer in the report."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from lrrobust.results import write_file
from lrrobust.results.files import explaining, read_file

#: Lists what the last report wrote beside it, by name, with the sha256 of each file.
RECORD_NAME = ".written.json"


def remove_leftovers(out_dir: Path, written: Sequence[Path]) -> list[Path]:
    """Removes what the last report wrote into a folder and this one did not, and records what this one wrote.

    A figure of runs that left the report would else stand beside those of the report. A file that somebody changed
    since is no longer the report's, and stays.

    Args:
        out_dir: folder of the report.
        written: all files of this report, in that folder.

    Returns:
        The files removed.

    Raises:
        StoreError: a file cannot be removed, or the record cannot be written.
    """
    now = _digests(written)
    removed = []
    for name, sha256 in _read_record(out_dir).items():
        path = out_dir / name
        # Names that differ in case alone may be of one file.
        if name in now or _sha256(path) != sha256 or any(path.samefile(other) for other in written if other.exists()):
            continue
        with explaining("remove", path):
            path.unlink()
        removed.append(path)
    _write_record(out_dir, now)
    return removed


def note_unfinished(out_dir: Path, written: Sequence[Path]) -> None:
    """Records what a report that failed has written, beside what the one before it did, for the next to remove."""
    _write_record(out_dir, {**_read_record(out_dir), **_digests(written)})


def _digests(paths: Sequence[Path]) -> dict[str, str]:
    found = {path.name: _sha256(path) for path in paths}
    return {name: sha256 for name, sha256 in found.items() if sha256 is not None}


def _write_record(out_dir: Path, digests: Mapping[str, str]) -> None:
    write_file(out_dir / RECORD_NAME, json.dumps(digests, indent=2).encode() + b"\n")


def _read_record(out_dir: Path) -> Mapping[str, str]:
    """Names of files directly in the folder; nothing where the record is missing, damaged or says anything else."""
    try:
        record = json.loads(read_file(out_dir / RECORD_NAME))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(record, dict):
        return {}
    return {name: sha256 for name, sha256 in record.items() if isinstance(sha256, str) and _is_file_name(name)}


def _is_file_name(name: str) -> bool:
    return name == Path(name).name and name not in ("", ".", "..", RECORD_NAME) and name.isprintable()


def _sha256(path: Path) -> str | None:
    """None for what is no regular file that can be read, such as a link."""
    try:
        return None if path.is_symlink() else hashlib.sha256(read_file(path)).hexdigest()
    except (OSError, ValueError):
        return None
