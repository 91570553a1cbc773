"""Runs -> curves: exact ones of minimal-norm attacks, and robust accuracy against what attacks spent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from lrrobust.report.naming import WORST_CASE, name_runs
from lrrobust.report.outcomes import outcomes
from lrrobust.report.summary import identify, stack
from lrrobust.results import Run
from lrrobust.stats import curve_over_passes, wilson_interval

#: Columns of the curves of minimal-norm attacks; units as in a summary.
CURVE_COLUMNS = (
    "model",
    "weights",
    "dataset",
    "attack",
    "norm",
    "eps",
    "n",
    "robust_accuracy",
    "ci_low",
    "ci_high",
    "is_complete",
    "run",
    "dataset_sha256",
)

#: Columns of the curves over passes; units as in a summary, `passes` of one image.
PASS_COLUMNS = ("run", "attack", "norm", "eps", "passes", "robust_accuracy")


def minimal_norm_curves(runs: Sequence[Run]) -> pd.DataFrame:
    """Robust accuracy at every eps at once, for the attacks that search the nearest adversarial image.

    These are the attacks with rows at eps = infinity. Their robust accuracy at eps is the share of
    images that are correct when clean and whose adversarial image is farther away than eps: a step
    function, given by its value at 0 and at each distance found.

    Returns:
        Columns `CURVE_COLUMNS`, eps ascending within each run and attack.
    """
    curves = []
    for name, run in name_runs(runs).items():
        verdicts = outcomes(run)
        for (attack, norm), group in verdicts.groupby(["attack", "norm"], sort=False):
            if not np.isinf(group["eps"]).any():
                continue
            # Over all rows of an image: what an earlier attack of the suite broke has no distance of this one's.
            images, image = np.unique(group["index"], return_inverse=True)
            broken_at = np.full(len(images), np.inf)
            np.minimum.at(broken_at, image, group["breaking_eps"].to_numpy())
            n, steps = len(images), np.unique(np.append(broken_at[np.isfinite(broken_at)], 0.0))
            robust = n - np.searchsorted(np.sort(broken_at), steps, side="right")
            low, high = np.transpose([wilson_interval(count, n) for count in robust.tolist()])
            curve = {"attack": attack, "norm": norm, "eps": steps, "n": n}
            curve |= {"robust_accuracy": robust / n, "ci_low": low, "ci_high": high}
            curves.append(pd.DataFrame(identify(run, name) | curve)[list(CURVE_COLUMNS)])
    return stack(curves, CURVE_COLUMNS)


def pass_curves(runs: Mapping[str, Run], eps: Mapping[str, float]) -> tuple[pd.DataFrame, bool]:
    """Robust accuracy against the passes that each attack spent on an image.

    Args:
        runs: name, as in a summary, -> run.
        eps: norm -> the budget shown; attacks without it are left out, and those whose passes were not counted.

    Returns:
        Columns `PASS_COLUMNS`, passes ascending from 0 within each run and attack; and whether they include backward
        passes, which older runs did not count: then no run's are, so that they compare.
    """
    verdicts = {name: outcomes(run) for name, run in runs.items()}
    shown = {name: found[found["eps"] == found["norm"].map(eps)] for name, found in verdicts.items()}
    with_backward = all(found["backward_passes"].notna().all() for found in shown.values())
    curves = []
    for name, found in shown.items():
        for (attack, norm), group in found.groupby(["attack", "norm"], sort=False):
            spent = group["forward_passes"] + (group["backward_passes"] if with_backward else 0)
            if spent.isna().any():
                continue
            passes, accuracy = curve_over_passes(spent, group["is_clean_correct"], group["is_broken"])
            if group["is_broken_earlier"].any():
                attack += ", cumulative"
            curve = {"run": name, "attack": attack, "norm": norm, "eps": eps[norm]}
            curves.append(pd.DataFrame(curve | {"passes": passes, "robust_accuracy": accuracy}))
    return stack(curves, PASS_COLUMNS), with_backward


def telling_eps(rows: pd.DataFrame) -> float | None:
    """The eps of a norm that tells attacks apart best: where about half of the accuracy is left in the worst case.

    Args:
        rows: of a summary, of one norm and dataset.

    Returns:
        Of the finite eps above 0, that at which the mean robust accuracy of all runs is nearest to half of their
        clean accuracy, the smallest of several; None where there is none.
    """
    worst = rows[rows["attack"] == WORST_CASE]
    found = rows if worst.empty else worst
    found = found[np.isfinite(found["eps"]) & (found["eps"] > 0)]
    if found.empty:
        return None
    means = found.groupby("eps")[["robust_accuracy", "clean_accuracy"]].mean()
    return float((means["robust_accuracy"] - means["clean_accuracy"] / 2).abs().idxmin())
