"""Files that appear whole or not at all, and failures of the file system in one line."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from lrrobust.errors import StoreError

#: How what is on its way to its place is called, and for how long it may stay unchanged if its writer lives: others may be
#: suspended, and clocks of machines that share a folder differ by hours.
PREFIX, SUFFIX = ".lrrobust-", ".tmp"
_DEAD_AFTER_S = 24 * 3600


def write_file(path: Path, content: bytes) -> None:
    """Put `content` at `path`, whole or not at all, also across a crash; creates the folder.

    Raises:
        StoreError: the disk is full or does not let us write. The former file, if any, is kept.
    """
    with explaining("write", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_left(path.parent.absolute())
        # Not after the file, whose name may be as long as names can be.
        temporary = path.with_name(f"{PREFIX}{secrets.token_hex(8)}{SUFFIX}")
        try:
            with open(temporary, "xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)


@cache
def remove_left(folder: Path) -> None:
    """Removes, once in a process, what killed ones left in a folder on its way."""
    for path in folder.glob(f"{PREFIX}*{SUFFIX}"):
        # Another process may just be done with it.
        with contextlib.suppress(OSError):
            if time.time() - path.lstat().st_mtime > _DEAD_AFTER_S:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def keep_copy(path: Path) -> Path:
    """Copies a file to the first free of the names FILE.old, FILE.old2, ..., which it returns; StoreError where it cannot."""
    copy = path.with_name(f"{path.name}.old")
    number = 1
    while copy.exists():
        number += 1
        copy = path.with_name(f"{path.name}.old{number}")
    try:
        content = read_file(path)
    except OSError as error:
        raise StoreError(f"cannot keep a copy of what {path} holds now ({error.strerror}): choose another place") from None
    write_file(copy, content)
    return copy


def read_file(path: Path, most_bytes: int = -1) -> bytes:
    """The bytes of a regular file, or the first of them: a pipe would have us wait, a device never end.

    Raises:
        OSError: there is none, it is of another kind, or it cannot be read.
    """
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0))) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
        return file.read(most_bytes)


@contextlib.contextmanager
def explaining(verb: str, path: Path) -> Iterator[None]:
    """Turn failures of the operating system into one line for the user."""
    try:
        yield
    except OSError as error:
        if verb == "read" and isinstance(error, FileNotFoundError):
            raise  # an absent file is an answer, not a failure
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StoreError(
                f"no room on disk while writing {path}; what was computed before is kept; "
                "free space and run the same command again"
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise StoreError(
                f"not allowed to {verb} {path} ({error.strerror}); change its permissions or choose another folder"
            ) from error
        raise StoreError(
            f"could not {verb} {path} ({error.strerror or error}); what was computed before is kept; "
            "mend this and run the same command again"
        ) from error


def _sync_folder(folder: Path) -> None:
    # Makes a rename itself survive a power cut. Windows cannot open folders, some network file
    # systems cannot sync them: there the rename is as durable as it gets.
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
