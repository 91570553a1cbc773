"""Who may write to the folder of a run: one process, or several that share its work."""

from __future__ import annotations

import errno
import logging
import os
import time
import weakref
from pathlib import Path

from lrrobust.errors import StoreError
from lrrobust.results.files import explaining

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_log = logging.getLogger(__name__)

#: Whoever comes to a shared folder first has it alone for a moment, to set it up; the others wait that long.
_SETTING_UP_S = 30.0
_SHARED = "shared"


class FolderLock:
    """A folder taken by this process; let go with `close`, with the object, or with the process, however that ends.

    Args:
        folder: exists.
        is_shared: whether others that say the same may have it as well. The first of them has it
            alone until it calls `share`.

    Attributes:
        is_alone: no other process writes, so that what others left half done is nobody's. Never true
            where the file system has no locks.

    Raises:
        StoreError: another process has the folder and does not share it, or it cannot be written.
    """

    def __init__(self, folder: Path, *, is_shared: bool) -> None:
        self.is_alone = False
        self._descriptor: int | None = None
        if fcntl is None:
            return
        path = folder / ".lock"
        with explaining("write", path):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                self.is_alone = _try(descriptor, fcntl.LOCK_EX)
                if not self.is_alone and not (is_shared and _wait_for_share(descriptor)):
                    raise StoreError(_refusal(folder, os.pread(descriptor, 20, 0).decode(errors="replace")))
                if self.is_alone:
                    os.ftruncate(descriptor, 0)
                    os.pwrite(descriptor, (_SHARED if is_shared else str(os.getpid())).encode(), 0)
            except OSError as error:
                os.close(descriptor)
                if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                    raise
                if not is_shared:
                    _log.warning("%s cannot be locked (%s); let only one process write to it", folder, error.strerror)
                return
            except BaseException:
                os.close(descriptor)
                raise
        self._descriptor = descriptor
        self._release = weakref.finalize(self, os.close, descriptor)

    def share(self) -> None:
        """Let those in that share."""
        if self._descriptor is not None and self.is_alone:
            fcntl.flock(self._descriptor, fcntl.LOCK_SH)
            self.is_alone = False

    def close(self) -> None:
        """Let others write. Closing twice does no harm."""
        if self._descriptor is not None:
            self._release()


def _try(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _wait_for_share(descriptor: int) -> bool:
    deadline = time.monotonic() + _SETTING_UP_S
    while not _try(descriptor, fcntl.LOCK_SH):
        holder = os.pread(descriptor, 20, 0).decode(errors="replace")
        # One that does not share says so by its pid; it may be yet to write it.
        if time.monotonic() > deadline - (_SETTING_UP_S - 1 if holder.isdecimal() else 0):
            return False
        time.sleep(0.02)
    return True


def _refusal(folder: Path, holder: str) -> str:
    if holder == _SHARED:
        return (
            f"other lrrobust processes share the work in {folder}; "
            "join them with --share, wait for them to finish, or choose another folder"
        )
    return (
        f"another lrrobust process (pid {holder or 'unknown'}) is writing {folder}; "
        "wait for it to finish, stop it, or choose another folder"
    )
