"""What this process may use, and settings of it that make tensor code fast, made before torch is loaded."""

from __future__ import annotations

import ctypes
import os

# Parameters of glibc's mallopt, from malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_LARGEST_INT = 2**31 - 1


def count_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def settle_process() -> None:
    """Calmer threads and an allocator that keeps memory.

    The threads of OpenMP spin for milliseconds while they wait for each other, which on a machine that others
    use as well slows an evaluation down many times over. `GOMP_SPINCOUNT` turns bridge the gaps between
    operations and are over before they harm anybody; whoever has set it is not overruled.

    glibc gives every large tensor back to the system when it is freed and has the next one cleared page by
    page; on the large maps of an LR-Net's first layers a tenth of a gradient step went there. Keeping
    the memory costs nothing that the step's peak does not need again. Does nothing on other C libraries.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # no glibc: musl, macOS, Windows
        return
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, _LARGEST_INT)
    mallopt(_M_TOP_PAD, 1 << 28)
