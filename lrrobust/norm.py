"""The norms that distances are measured in; needs no torch."""

from __future__ import annotations

from typing import Literal, get_args

Norm = Literal["linf", "l2", "l1"]

#: Those that attacks know which were published without l1.
LinfOrL2 = Literal["linf", "l2"]

NORMS: tuple[Norm, ...] = get_args(Norm)
