"""Runs -> robust accuracy with its interval, for each attack and for the worst case."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from lrrobust.report.naming import WORST_CASE, name_models, name_runs
from lrrobust.report.outcomes import outcomes
from lrrobust.results import Run, manifest_value
from lrrobust.stats import balanced_share, median_with_failures, wilson_interval

#: Columns of a summary. Accuracies and interval are fractions, eps and median_distance pixel units of
#: [0, 1], wall_s seconds, passes images through the network, the mean over images of what was spent on one up to
#: that eps (`stats.passes_up_to`), NaN where not counted; dataset_sha256 tells apart datasets and subsets of one name.
#: surrogate names the model that the images were made on, where it is not the model itself; robust_accuracy_quantized is
#: NaN where it was not asked for. The balanced accuracies are means over classes, effective_n says how many images that
#: are spread evenly would tell as much (`stats.balanced_share`). is_cumulative: see `name_attack`.
SUMMARY_COLUMNS = (
    "model",
    "weights",
    "surrogate",
    "dataset",
    "attack",
    "norm",
    "eps",
    "n",
    "clean_accuracy",
    "robust_accuracy",
    "ci_low",
    "ci_high",
    "balanced_clean_accuracy",
    "balanced_robust_accuracy",
    "balanced_ci_low",
    "balanced_ci_high",
    "effective_n",
    "robust_accuracy_quantized",
    "median_distance",
    "wall_s",
    "forward_passes",
    "backward_passes",
    "is_cumulative",
    "is_complete",
    "run",
    "dataset_sha256",
)


def summarise(runs: Sequence[Run]) -> pd.DataFrame:
    """Of each run one row for each attack and eps, then one `worst_case` row for each eps of a norm; runs are never pooled.

    An attack's rows cover the images it has finished. The worst case covers the images that every
    attack of the norm has finished, and is given for norms with more than one attack: an image counts
    as broken at eps when any of them has a verified adversarial image within eps, be it one found at
    a smaller eps or by a minimal-norm attack. It hence never rises with eps, nor with more attacks.

    Returns:
        Columns `SUMMARY_COLUMNS`. `median_distance` is over the images correct when clean, in the
        norm of the attack, failures counted as infinity, and NaN where an earlier attack of the suite broke
        images; `is_complete` is that of the run; `wall_s` adds up the rows summarised; `run` holds as much of the folders'
        paths as makes them differ, and so does `model` where files of one name hold different models.

    Raises:
        StoreError: a manifest does not say what was evaluated, or a folder is given twice.
    """
    named = name_runs(runs)
    models = name_models(named)
    frames = [_summary(run, name).assign(model=models[name]) for name, run in named.items()]
    return stack(frames, SUMMARY_COLUMNS)


def _summary(run: Run, name: str) -> pd.DataFrame:
    verdicts = outcomes(run)
    # As far as another attack had a hand in its rows.
    cumulative = set(verdicts.loc[verdicts["is_broken_earlier"], "attack"])
    # Arrays: to cut a data frame into pieces takes longer than all that is computed of them.
    columns = {name: column.to_numpy() for name, column in verdicts.items()}
    records = []
    for (attack, norm), places in verdicts.groupby(["attack", "norm"], sort=False).indices.items():
        eps = columns["eps"][places]
        for at in np.unique(eps):
            of_eps = {name: columns[name][places[eps == at]] for name in _COUNTED}
            about = {"attack": attack, "norm": norm, "eps": float(at), "is_cumulative": attack in cumulative}
            records.append(about | _accuracies(of_eps, attack in cumulative))
    for norm, of_norm in verdicts.groupby("norm", sort=False):
        about = {"attack": WORST_CASE, "norm": norm, "is_cumulative": False}
        records.extend(about | record for record in _worst_cases(run, norm, of_norm))
    identity = identify(run, name)
    return pd.DataFrame([identity | record for record in records], columns=list(SUMMARY_COLUMNS))


#: Columns of outcomes that the numbers of a summary are made of.
_COUNTED = (
    "label", "is_clean_correct", "is_broken", "is_broken_quantized", "distance", "wall_s", "forward_passes", "backward_passes",
)  # fmt: skip


def _accuracies(verdicts: Mapping[str, np.ndarray], is_cumulative: bool = False) -> dict[str, Any]:
    """Numbers of one attack at one eps, from the columns `_COUNTED` with one row for each image, at least one."""
    balanced = balanced_share(~verdicts["is_broken"], verdicts["label"])
    n, robust = len(verdicts["label"]), int((~verdicts["is_broken"]).sum())
    attacked = verdicts["distance"][verdicts["is_clean_correct"]]
    low, high = wilson_interval(robust, n)
    return {
        "n": n,
        "clean_accuracy": len(attacked) / n,
        "robust_accuracy": robust / n,
        "ci_low": low,
        "ci_high": high,
        "balanced_clean_accuracy": balanced_share(verdicts["is_clean_correct"], verdicts["label"]).share,
        "balanced_robust_accuracy": balanced.share,
        "balanced_ci_low": balanced.low,
        "balanced_ci_high": balanced.high,
        "effective_n": balanced.effective_n,
        # NaN, where rounded images were not asked for, spreads.
        "robust_accuracy_quantized": float(1 - verdicts["is_broken_quantized"].mean()),
        # What an earlier attack broke was not attacked: there is no distance, and that is no failure.
        "median_distance": math.nan if is_cumulative else median_with_failures(attacked[np.isfinite(attacked)], len(attacked)),
        "wall_s": float(verdicts["wall_s"].sum()),
        "forward_passes": float(verdicts["forward_passes"].mean()),
        "backward_passes": float(verdicts["backward_passes"].mean()),
    }


def _worst_cases(run: Run, norm: str, verdicts: pd.DataFrame) -> Iterator[dict[str, Any]]:
    attacks = {spec["name"] for spec in manifest_value(run, "attacks") if spec["norm"] == norm}
    if len(attacks) < 2:
        return
    images, image = np.unique(verdicts["index"], return_inverse=True)
    made = np.zeros((len(images), verdicts["attack"].nunique()), dtype=bool)
    made[image, pd.factorize(verdicts["attack"])[0]] = True
    is_finished = made.sum(axis=1) == len(attacks)
    if not is_finished.any():
        return
    eps = verdicts["eps"].to_numpy()
    worst, nearest, worst_quantized = np.full((3, len(images)), np.inf)
    np.minimum.at(worst, image, verdicts["breaking_eps"].to_numpy())
    np.minimum.at(nearest, image, verdicts["distance"].to_numpy())
    is_clean_correct = np.ones(len(images), dtype=bool)
    is_clean_correct[image[~verdicts["is_clean_correct"].to_numpy()]] = False
    labels = np.zeros(len(images), dtype=np.int64)
    labels[image] = verdicts["label"].to_numpy()
    # The distance of a rounded image is not in the rows: it counts from the eps of its row, at any distance at the latest.
    quantized = verdicts["is_broken_quantized"].to_numpy()
    row_eps = np.minimum(eps, np.finfo(np.float64).max)
    np.minimum.at(worst_quantized, image, np.where(quantized == 1, row_eps, np.inf))
    worst_quantized[~is_clean_correct] = 0.0
    is_asked = not np.isnan(quantized).any()
    for at in np.unique(eps[is_finished[image]]):
        # At eps = infinity `worst <= at` would hold for the unbroken too.
        is_broken = (worst <= at) & np.isfinite(worst)
        is_quantized = (worst_quantized <= at) & np.isfinite(worst_quantized)
        rows = eps == at
        spent = {
            name: np.bincount(image[rows], verdicts[name].to_numpy()[rows], len(images))
            for name in ("wall_s", "forward_passes", "backward_passes")
        }
        columns = {
            "label": labels,
            "is_clean_correct": is_clean_correct,
            "is_broken": is_broken,
            "is_broken_quantized": is_quantized.astype(float) if is_asked else np.full(len(images), np.nan),
            "distance": np.where(is_broken, nearest, np.inf),
        }
        yield {"eps": float(at)} | _accuracies({name: column[is_finished] for name, column in (columns | spent).items()})


def identify(run: Run, name: str) -> dict[str, Any]:
    """What tells a run apart: the columns that all its rows of a summary or of a curve share."""
    weights = manifest_value(run, "model", "weights")
    surrogate = run.manifest.get("surrogate")
    return {
        "model": manifest_value(run, "model", "name"),
        "weights": None if weights is None else str(weights),
        "surrogate": None if surrogate is None else str(surrogate["name"]),
        "dataset": manifest_value(run, "dataset", "name"),
        "is_complete": run.is_complete,
        "run": name,
        "dataset_sha256": manifest_value(run, "dataset", "sha256"),
    }


def stack(frames: Sequence[pd.DataFrame], columns: Sequence[str]) -> pd.DataFrame:
    """Frames of the same columns, one after the other."""
    # Empty frames have no dtypes worth keeping, and pandas warns when it has to guess.
    filled = [frame for frame in frames if not frame.empty]
    return pd.concat(filled, ignore_index=True) if filled else pd.DataFrame(columns=list(columns))
