"""Adversarial images made on one model and judged on another: the matrix of all pairs, and what it says of masking.

A transfer run is an ordinary run of the model that judges, the target; its manifest names the model that was attacked,
the surrogate. A run without one is a white-box run: there the target itself was attacked.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from lrrobust.results import Run, breaking_eps, group_runs, manifest_value, texts
from lrrobust.stats import mcnemar_p_value, wilson_interval

#: Probability, at most, with which a sound white-box attack on one target is said to be beaten by transferred images.
#: Small, because a false alarm withholds an honest verdict.
SIGNIFICANCE = 0.01

#: Source of the rows that count an image as broken when the images of any source break it.
ANY_SOURCE = "any of these"

#: Columns of a transfer matrix; accuracies and interval are fractions over all n images, eps pixel units of [0, 1].
MATRIX_COLUMNS = (
    "dataset",
    "attack",
    "norm",
    "eps",
    "source",
    "target",
    "n",
    "clean_accuracy",
    "robust_accuracy",
    "ci_low",
    "ci_high",
    "dataset_sha256",
)


@dataclass(frozen=True)
class TransferTest:
    """Images of a surrogate against the target's own attacks, on the same n images, at one eps.

    Attributes:
        target: what a run's manifest says of the model that judges.
        surrogate: likewise of the model that was attacked.
        transfer_only: images that only an attack on the surrogate broke.
        white_box_only: images that only an attack on the target itself broke.
        p_value: exact one-sided McNemar test against transfer breaking more than the white-box attacks together.
    """

    target: Mapping[str, Any]
    surrogate: Mapping[str, Any]
    norm: str
    eps: float
    n: int
    transfer_only: int
    white_box_only: int
    p_value: float


def surrogate_of(run: Run) -> Mapping[str, Any] | None:
    """What the manifest says of the model that was attacked in the target's stead; None in a white-box run."""
    return run.manifest.get("surrogate")


def transfer_matrix(runs: Sequence[Run]) -> pd.DataFrame:
    """Robust accuracy by source and target, for the sets of images that a transfer run saw.

    The source of a white-box run is its own target. Images of one attack on one source that several runs judged count
    as broken when any of the runs broke them. Where a target has several sources, rows of `ANY_SOURCE` follow, over the
    images that all of them have finished and at the eps that they share: the worst case, transfer included.

    Returns:
        Columns `MATRIX_COLUMNS`; empty without a transfer run.

    Raises:
        StoreError: a manifest does not say what was evaluated.
    """
    records: list[dict[str, Any]] = []
    for of_dataset in _by_dataset(runs):
        names = _name_models(of_dataset)
        cells: dict[tuple[str, str, str], dict[str, list[_Broken]]] = {}
        for run in of_dataset:
            target = names[_key(manifest_value(run, "model"))]
            source = names[_key(surrogate_of(run) or manifest_value(run, "model"))]
            for broken in _broken(run):
                cells.setdefault((broken.attack, broken.norm, target), {}).setdefault(source, []).append(broken)
        dataset = manifest_value(of_dataset[0], "dataset")
        for (attack, norm, target), by_source in cells.items():
            sources = dict(sorted(by_source.items(), key=lambda item: item[0] != target))
            shown = {source: _join(found, set.union) for source, found in sources.items()}
            if len(sources) > 1:
                shown[ANY_SOURCE] = _join([broken for found in sources.values() for broken in found], set.intersection)
            for source, (eps_of_images, ladder) in shown.items():
                about = {"dataset": dataset["name"], "attack": attack, "norm": norm, "source": source, "target": target}
                about["dataset_sha256"] = dataset["sha256"]
                records.extend(about | at_eps for at_eps in _accuracies(eps_of_images, ladder))
    return pd.DataFrame(records, columns=list(MATRIX_COLUMNS))


def compare_with_white_box(runs: Sequence[Run]) -> list[TransferTest]:
    """Do images made on surrogates break more than the attacks on the targets themselves?

    For each target, surrogate and norm, at each eps that both were attacked at: the attacks that were made on both
    with the same settings, as far as their images come from the surrogate, against all white-box attacks on the target
    together. A white-box attack sees the gradient of the very model that judges; that it does worse than one that does
    not says that this gradient leads astray, as masked gradients do.

    Raises:
        StoreError: a manifest does not say what was evaluated.
    """
    tests = []
    for of_dataset in _by_dataset(runs):
        white: dict[str, list[Run]] = {}
        transferred: dict[tuple[str, str], list[Run]] = {}
        for run in of_dataset:
            target, surrogate = _key(manifest_value(run, "model")), surrogate_of(run)
            if surrogate is None:
                white.setdefault(target, []).append(run)
            else:
                transferred.setdefault((target, _key(surrogate)), []).append(run)
        for (target, surrogate), theirs in transferred.items():
            tests.extend(_compare(white.get(target, []), theirs, json.loads(target), json.loads(surrogate)))
    return tests


def find_masking(tests: Sequence[TransferTest]) -> TransferTest | None:
    """The clearest of one target's tests, if it is significant given how many there are (Bonferroni)."""
    clearest = min(tests, key=lambda test: test.p_value, default=None)
    return clearest if clearest is not None and clearest.p_value * len(tests) <= SIGNIFICANCE else None


@dataclass(frozen=True)
class _Broken:
    """One attack of one run: the smallest eps at which each image is broken, and the eps it was made at."""

    attack: str
    norm: str
    eps_of_images: pd.Series
    ladder: set[float]


def _broken(run: Run) -> Iterator[_Broken]:
    rows = pd.DataFrame({name: texts(run.rows[name]) for name in ("attack", "norm")})
    rows["index"], rows["eps"] = run.rows["index"].to_numpy(np.int64), run.rows["eps"].to_numpy(np.float64)
    rows["broken"] = breaking_eps(run.rows)
    for (attack, norm), of_attack in rows.groupby(["attack", "norm"], sort=False):
        yield _Broken(attack, norm, of_attack.groupby("index")["broken"].min(), set(of_attack["eps"].unique().tolist()))


def _join(found: Sequence[_Broken], combine: Any) -> tuple[pd.Series, set[float]]:
    """The images that all have finished, each at the smallest eps that any broke it at; and their eps combined."""
    together = pd.concat([broken.eps_of_images for broken in found], axis=1, join="inner").min(axis=1)
    return together, combine(*(broken.ladder for broken in found))


def _accuracies(eps_of_images: pd.Series, ladder: set[float]) -> Iterator[dict[str, Any]]:
    n = len(eps_of_images)
    for eps in sorted(ladder) if n else ():
        robust = int((eps_of_images > eps).sum() if np.isfinite(eps) else np.isinf(eps_of_images).sum())
        low, high = wilson_interval(robust, n)
        yield {
            "eps": eps,
            "n": n,
            "clean_accuracy": float((eps_of_images > 0).mean()),
            "robust_accuracy": robust / n,
            "ci_low": low,
            "ci_high": high,
        }


def _compare(
    white: Sequence[Run], transferred: Sequence[Run], target: Mapping[str, Any], surrogate: Mapping[str, Any]
) -> Iterator[TransferTest]:
    settings = [{_key(spec) for run in runs for spec in manifest_value(run, "attacks")} for runs in (white, transferred)]
    shared = {json.loads(spec)["name"] for spec in set.intersection(*settings)}
    ours = [broken for run in white for broken in _broken(run)]
    theirs = [broken for run in transferred for broken in _broken(run) if broken.attack in shared]
    for norm in dict.fromkeys(broken.norm for broken in theirs):
        own, of_surrogate = ([broken for broken in side if broken.norm == norm] for side in (ours, theirs))
        if not own:
            continue
        (own_eps, own_ladder), (their_eps, their_ladder) = (_join(side, set.union) for side in (own, of_surrogate))
        own_eps, their_eps = own_eps.align(their_eps, join="inner")
        for eps in sorted(eps for eps in own_ladder & their_ladder if 0 < eps < np.inf):
            by_own, by_theirs = own_eps <= eps, their_eps <= eps
            counts = int((by_theirs & ~by_own).sum()), int((by_own & ~by_theirs).sum())
            p_value = float(mcnemar_p_value(*counts, alternative="greater"))
            yield TransferTest(target, surrogate, norm, eps, len(own_eps), *counts, p_value)


def _by_dataset(runs: Sequence[Run]) -> list[list[Run]]:
    """Runs on the same images, where one of them is a transfer run."""
    groups = group_runs(runs, "dataset", "sha256").values()
    return [group for group in groups if any(surrogate_of(run) is not None for run in group)]


def _key(record: Mapping[str, Any]) -> str:
    return json.dumps(record, sort_keys=True)


def _name_models(runs: Sequence[Run]) -> dict[str, str]:
    """Each model, by its record as text, under as little of name, weights and hash as tells all apart."""
    models = [model for run in runs for model in (manifest_value(run, "model"), surrogate_of(run)) if model is not None]
    records = {_key(model): model for model in models}
    named = {key: str(model["name"]) for key, model in records.items()}
    longer = {key: f"{named[key]} ({model.get('weights') or 'own weights'})" for key, model in records.items()}
    longest = {key: f"{longer[key]} {str(model.get('state_sha256'))[:8]}" for key, model in records.items()}
    return next((names for names in (named, longer) if len(set(names.values())) == len(names)), longest)
