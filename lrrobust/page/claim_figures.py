"""A judged claim -> its figures."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import pandas as pd

from lrrobust.plots import render_differences, render_distances
from lrrobust.report.drawing import Sketch
from lrrobust.report.naming import WORST_CASE, slug
from lrrobust.verdict.records import ClaimResult

_KINDS = ("png", "svg", "pdf")


def sketch_claims(results: Sequence[ClaimResult]) -> list[list[Sketch]]:
    """Of each result on all images: for each norm the paired differences, and where a minimal-norm attack was run, the
    distances."""
    return [_sketch(result) for result in results]


def _sketch(result: ClaimResult) -> list[Sketch]:
    claim, pairing = result.claim, result.pairing
    subset = hashlib.sha256("".join(pairing.dataset_sha256).encode()).hexdigest()
    name = f"{slug(claim.name)}_{slug(pairing.dataset)}_{subset[:8]}"
    shown = [c for c in result.comparisons if c.population == "all"]
    sketches = []
    for norm in dict.fromkeys(c.norm for c in shown):
        images = f"{pairing.dataset}, {norm}, n = {pairing.n}"
        rows = pd.DataFrame([c.model_dump() for c in shown if c.norm == norm])
        title = f"{claim.treatment} minus {claim.control}, {images}"
        arguments = (rows, title, claim.smallest_difference, _KINDS)
        sketches.append(Sketch(subset, f"differences_{name}_{norm}", title, render_differences, arguments))
        curves = distance_curves(result, norm)
        if curves["is_minimal_norm"].any():
            title = f"{claim.treatment} and {claim.control}, {images}"
            arguments = (curves, norm, title, _KINDS)
            sketches.append(Sketch(subset, f"distances_{name}_{norm}", title, render_distances, arguments))
    return sketches


def distance_curves(result: ClaimResult, norm: str) -> pd.DataFrame:
    """Both models under every attack of a norm on all images; columns as `plots.render_distances` takes them.

    Minimal-norm attacks by their survival curves, the others by the ladder, from the clean accuracy at 0.
    """
    claim, pairing = result.claim, result.pairing
    curves = []

    def add(attack: str, eps: Sequence[float], treatment: Sequence[float], control: Sequence[float], is_minimal: bool) -> None:
        for model, accuracy in ((claim.treatment, treatment), (claim.control, control)):
            columns = {"model": model, "attack": attack, "eps": eps, "robust_accuracy": accuracy, "is_minimal_norm": is_minimal}
            curves.append(pd.DataFrame(columns))

    minimal = {}
    for found in result.norms:
        if (found.norm, found.population) == (norm, "all") and found.attack != WORST_CASE:
            minimal[found.attack] = found.survival
    for found in result.curves:
        if (found.norm, found.population) == (norm, "all") and found.attack not in (WORST_CASE, *minimal):
            treatment = (pairing.treatment_clean, *found.treatment_robust)
            control = (pairing.control_clean, *found.control_robust)
            add(found.attack, (0.0, *found.eps), treatment, control, is_minimal=False)
    for attack, points in minimal.items():
        if points:
            add(attack, *zip(*((point.distance, point.treatment, point.control) for point in points)), is_minimal=True)
    columns = ["model", "attack", "eps", "robust_accuracy", "is_minimal_norm"]
    return pd.concat(curves, ignore_index=True) if curves else pd.DataFrame(columns=columns)
