"""A judged claim -> its figures."""

from __future__ import annotations

import hashlib

import pandas as pd

from lrrobust.plots import render_differences
from lrrobust.report import Drawing, slug
from lrrobust.verdict.records import ClaimResult

_KINDS = ("png", "svg", "pdf")


def draw_claim(result: ClaimResult) -> list[Drawing]:
    """For each norm, the paired differences of robust accuracy on all images."""
    claim, pairing = result.claim, result.pairing
    subset = hashlib.sha256("".join(pairing.dataset_sha256).encode()).hexdigest()
    name = f"{slug(claim.name)}_{slug(pairing.dataset)}_{subset[:8]}"
    shown = [c for c in result.comparisons if c.population == "all"]
    drawings = []
    for norm in dict.fromkeys(c.norm for c in shown):
        rows = pd.DataFrame([c.model_dump() for c in shown if c.norm == norm])
        title = f"{claim.treatment} minus {claim.control}, {pairing.dataset}, {norm}, n = {pairing.n}"
        files = render_differences(rows, title, claim.smallest_difference, _KINDS)
        drawings.append(Drawing(subset, f"differences_{name}_{norm}", title, files))
    return drawings
