"""How much memory this process holds, as the system counts it."""

from __future__ import annotations

import math


def resident_bytes(field: str) -> float:
    """Resident memory of this process, now ("VmRSS") or at its peak ("VmHWM"), in bytes.

    NaN where the system does not tell: it is read from /proc, so only Linux does.
    """
    try:
        with open("/proc/self/status", encoding="ascii") as status:
            for line in status:
                if line.startswith(f"{field}:"):
                    return float(line.split()[1]) * 1024
    except OSError:
        pass
    return math.nan
