"""How much memory this process holds, as the system counts it."""

from __future__ import annotations

import ctypes
import math

#: Bytes of an allocation from which on glibc takes pages of their own for it, and gives them back with it: mallopt(3).
_M_MMAP_THRESHOLD, _PAGES_OF_THEIR_OWN = -3, 64 * 1024


def resident_bytes(field: str, process: int | None = None) -> float:
    """Resident memory of a process, by default this one, now ("VmRSS") or at its peak ("VmHWM"), in bytes.

    NaN where the system does not tell: it is read from /proc, so only Linux does; and for a process that has ended.
    """
    try:
        with open(f"/proc/{process or 'self'}/status", encoding="utf-8", errors="replace") as status:
            for line in status:
                if line.startswith(f"{field}:"):
                    return float(line.split()[1]) * 1024
    except OSError:
        pass
    return math.nan


def keep_no_freed_memory() -> None:
    """Has this process give back blocks of 64 KiB and more as it frees them, which takes time; nothing where it cannot.

    By default glibc keeps more and more of it in its heap, where pieces between blocks in use serve nobody: resident memory
    would tell of the heap's past, and not of what is needed.
    """
    try:
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _PAGES_OF_THEIR_OWN)
    except (AttributeError, OSError, TypeError):  # no glibc
        pass


def forget_freed_memory() -> None:
    """Gives back what was freed and kept, and makes the present the peak so far; nothing where the system cannot.

    A computation that finds room in what a preparation has freed would seem to need none.
    """
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):  # no glibc
        return
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")  # proc(5): resets the peak
    except OSError:
        pass
