"""A judged claim -> the tables that the page shows."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lrrobust.formatting import format_distance, format_eps
from lrrobust.report.naming import name_attack
from lrrobust.tables import Cell, Column, Table
from lrrobust.verdict.records import ClaimResult, Comparison

_POPULATIONS = {
    "all": "all images",
    "both_correct": "both correct",
    "matched_accuracy": "matched accuracy",
}


#: What the columns of `comparison_table` mean; confidence and power are the claim's.
HOW_TO_READ_COMPARISONS = (
    "Treatment minus control in percentage points, on the same images, with Tango's score intervals; p of the exact McNemar "
    "test, and adjusted by Holm over the rows that decide, or over the others. Detectable: the smallest difference that a row "
    "could have shown with the claim's power. Only: images robust under one model alone."
)


def comparison_table(comparisons: Sequence[Comparison]) -> Table:
    """Paired differences of robust accuracy, one row for each attack, eps and population."""
    columns = [
        Column("attack", True), Column("norm", True), Column("eps"), Column("images", True), Column("n"),
        Column("treatment %"), Column("control %"), Column("difference"), Column("interval"), Column("only treatment"),
        Column("only control"), Column("p"), Column("Holm p"), Column("detectable"),
    ]  # fmt: skip
    rows = []
    for c in comparisons:
        detectable = math.inf if c.smallest_detectable is None else c.smallest_detectable
        rows.append(
            [
                _text(name_attack(c.attack, c.is_cumulative)),
                _text(c.norm),
                Cell(format_eps(c.eps, c.norm), c.eps),
                _text(_POPULATIONS[c.population]),
                _count(c.n),
                _percent(c.treatment_accuracy),
                _percent(c.control_accuracy),
                _points(c.difference),
                _interval(c.low, c.high),
                _count(c.treatment_only),
                _count(c.control_only),
                _p(c.p_value),
                _p(c.p_holm),
                Cell("none" if math.isinf(detectable) else f"{100 * detectable:.1f}", detectable),
            ]  # fmt: skip
        )
    return Table(columns, rows)


def area_table(result: ClaimResult) -> Table:
    """Areas under the robustness curves."""
    columns = [
        Column("attack", True), Column("norm", True), Column("images", True), Column("n"), Column("eps from", True),
        Column("eps to", True), Column("treatment %"), Column("control %"), Column("difference"), Column("interval"),
    ]  # fmt: skip
    rows = [
        [
            _text(name_attack(c.attack, c.is_cumulative)),
            _text(c.norm),
            _text(_POPULATIONS[c.population]),
            _count(c.n),
            Cell(format_eps(c.eps[0], c.norm), c.eps[0]),
            Cell(format_eps(c.eps[-1], c.norm), c.eps[-1]),
            _percent(c.treatment_area),
            _percent(c.control_area),
            _points(c.difference),
            _interval(c.low, c.high),
        ]  # fmt: skip
        for c in result.curves
    ]
    return Table(columns, rows)


def norm_table(result: ClaimResult) -> Table:
    """Distances of the nearest adversarial images."""
    columns = [
        Column("attack", True), Column("norm", True), Column("images", True), Column("n"), Column("treatment median"),
        Column("control median"), Column("treatment failures"), Column("control failures"), Column("treatment farther"),
        Column("control farther"), Column("sign p"), Column("Wilcoxon p"), Column("effect size"),
    ]  # fmt: skip
    rows = [
        [
            _text(c.attack),
            _text(c.norm),
            _text(_POPULATIONS[c.population]),
            _count(c.n),
            _distance(c.treatment_median, c.norm),
            _distance(c.control_median, c.norm),
            _count(c.treatment_failures),
            _count(c.control_failures),
            _count(c.treatment_farther),
            _count(c.control_farther),
            _p(c.sign_p_value),
            _p(c.wilcoxon_p_value),
            Cell(f"{c.rank_biserial:+.2f}", c.rank_biserial),
        ]  # fmt: skip
        for c in result.norms
    ]
    return Table(columns, rows)


def _text(text: str) -> Cell:
    return Cell(text, text)


def _count(number: int) -> Cell:
    return Cell(str(number), number)


def _percent(fraction: float) -> Cell:
    return Cell(f"{100 * fraction:.1f}", fraction)


def _points(difference: float) -> Cell:
    """Percentage points, with their sign."""
    return Cell(f"{100 * difference:+.1f}", difference)


def _interval(low: float, high: float) -> Cell:
    return Cell(f"{100 * low:+.1f} to {100 * high:+.1f}", low)


def _p(value: float) -> Cell:
    return Cell(f"{value:.3f}" if value >= 0.001 else f"{value:.1e}", value)


def _distance(distance: float | None, norm: str) -> Cell:
    number = math.inf if distance is None else distance
    return Cell(format_distance(number, norm), number)
