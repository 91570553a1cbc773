"""Who is at which part of a run that several processes share, told by files in its folder alone.

A lease is a file that only one process can create. Its holder writes a new count into it while it gets on; one that
stands still is taken over by whoever has nothing else to do. Each watcher times that with its own clock, so clocks need not
agree, and may jump. A lease is no lock: where one is taken over from a holder that is only slow, the part is computed
twice, with the same rows, and stored under the same name.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import time
from collections.abc import Callable
from pathlib import Path

from lrrobust.interrupts import interrupts_held_back
from lrrobust.results.files import explaining

LEASES = "leases"

#: A holder writes this often in the time after which a lease counts as abandoned.
_BEATS = 6


class Leases:
    """The leases of one run, as one process sees them.

    Args:
        folder: of the lease files; created at the first lease.
        lease_s: seconds without a sign of its holder, after which a lease may be taken over.
        clock: seconds that never run backwards.
    """

    def __init__(self, folder: Path, lease_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._folder = folder
        self._lease_s = lease_s
        self._clock = clock
        # For people: where the holder is. The random part tells holders apart, also in containers that share a name.
        self._owner = f"{socket.gethostname()} {os.getpid()} {secrets.token_hex(8)}"
        self._held: set[str] = set()
        self._count = 0
        self._renewed = clock()
        #: What stood in the leases of others, and since when.
        self._seen: dict[str, tuple[bytes, float]] = {}

    def close(self) -> None:
        """Gives back all that this process holds."""
        with interrupts_held_back():
            for name in list(self._held):
                self.release(name)

    def taken(self) -> set[str]:
        """The names that somebody holds, or held when it died."""
        with explaining("read", self._folder):
            try:
                return {entry.name for entry in os.scandir(self._folder)}
            except FileNotFoundError:
                return set()

    def acquire(self, name: str) -> bool:
        """Takes what nobody holds; False where somebody was faster.

        Raises:
            StoreError: the folder cannot be written.
        """
        # Stopped between the file and the note of it, the process would leave a lease that nobody gives back.
        with interrupts_held_back(), explaining("write", self._folder / name):
            self._folder.mkdir(exist_ok=True)
            try:
                file = open(self._folder / name, "xb")
            except FileExistsError:
                return False
            with file:
                file.write(self._content())
            self._held.add(name)
        return True

    def take_over(self, name: str) -> bool:
        """Takes a lease whose holder has given no sign for `lease_s` under the eyes of this process.

        Raises:
            StoreError: the folder cannot be written.
        """
        path = self._folder / name
        content = _read(path)
        if content is None:
            return self.acquire(name)
        before, since = self._seen.get(name, (None, 0.0))
        if content != before:
            self._seen[name] = content, self._clock()
            return False
        if self._clock() - since < self._lease_s:
            return False
        # Of several that see this at once, one renames it.
        aside = path.with_name(f".{name}.{secrets.token_hex(4)}.tmp")
        with interrupts_held_back(), explaining("write", path):
            try:
                os.rename(path, aside)
            except FileNotFoundError:
                return False
            aside.unlink(missing_ok=True)
        del self._seen[name]
        return self.acquire(name)

    def renew(self) -> None:
        """Says that the holder gets on; costs nothing when called too often."""
        if not self._held or self._clock() - self._renewed < self._lease_s / _BEATS:
            return
        self._renewed = self._clock()
        self._count += 1
        for name in list(self._held):
            if not self._is_mine(name):
                self._held.discard(name)
                continue
            # Unsaid is no harm: at worst somebody else computes the same.
            with contextlib.suppress(OSError), open(self._folder / name, "r+b") as file:
                file.write(self._content())

    def release(self, name: str) -> None:
        """Gives back a lease; one that was taken over stays with whoever has it."""
        with interrupts_held_back():
            if name in self._held:
                self._held.discard(name)
                if self._is_mine(name):
                    with contextlib.suppress(OSError):
                        (self._folder / name).unlink()

    def _content(self) -> bytes:
        return f"{self._owner} {self._count:08d}\n".encode()

    def _is_mine(self, name: str) -> bool:
        content = _read(self._folder / name)
        return content is not None and content.startswith(self._owner.encode())


def clear_leases(folder: Path) -> None:
    """Removes all leases: for whoever knows that their holders are dead."""
    if folder.is_dir():
        for path in folder.iterdir():
            with explaining("write", path):
                path.unlink(missing_ok=True)


def _read(path: Path) -> bytes | None:
    """What stands there; nothing where the file is gone."""
    try:
        with explaining("read", path):
            return path.read_bytes()
    except FileNotFoundError:
        return None
