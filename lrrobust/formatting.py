"""Numbers as people read them, in tables, figures and sentences."""

from __future__ import annotations

import math

import pandas as pd


def format_eps(eps: float, norm: str) -> str:
    """A radius in pixel units as people write it.

    >>> format_eps(4 / 255, "linf"), format_eps(0.5, "l2"), format_eps(float("inf"), "l2")
    ('4/255', '0.5', 'any')
    """
    if math.isinf(eps):
        return "any"
    return f"{eps * 255:.4g}/255" if norm == "linf" and eps > 0 else f"{eps:.4g}"


def format_distance(distance: float, norm: str) -> str:
    """A distance in pixel units; a dash where there is none, as NaN says."""
    if math.isnan(distance):
        return "-"
    if math.isinf(distance):
        return "inf"
    return f"{distance * 255:.3g}/255" if norm == "linf" else f"{distance:.3g}"


def format_percent(fraction: float) -> str:
    """A fraction in percent, without the sign."""
    return f"{100 * fraction:.1f}"


def format_interval(low: float, high: float) -> str:
    """Limits of an accuracy in percent."""
    return f"{format_percent(low)}-{format_percent(high)}"


def format_count(count: int, noun: str) -> str:
    """How many there are of something.

    >>> format_count(1, "image"), format_count(500, "image")
    ('1 image', '500 images')
    """
    return f"{count} {noun}{'' if count == 1 else 's'}"


def format_duration(wall_s: float) -> str:
    """Seconds, minutes or hours."""
    if wall_s < 100:
        return f"{wall_s:.3g} s"
    return f"{wall_s / 60:.1f} min" if wall_s < 6000 else f"{wall_s / 3600:.1f} h"


def format_passes(forward: float, backward: float) -> str:
    """Forward and backward passes; where only some were counted, a question mark stands for the others."""
    if pd.isna(forward) and pd.isna(backward):
        return "-"
    return "+".join("?" if pd.isna(passes) else f"{passes:.3g}" for passes in (forward, backward))
