"""The norms that distances are measured in; needs no torch."""

from __future__ import annotations

from typing import Literal, get_args

Norm = Literal["linf", "l2", "l1"]

NORMS: tuple[Norm, ...] = get_args(Norm)
