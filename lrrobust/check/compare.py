"""The comparison: what may differ, which images flipped, and whether robust accuracy fell by more than chance allows.

Each attack at each eps is compared on the same images by McNemar's exact test, one-sided: had nothing changed but
noise, a flipped image would be lost (robust before, broken now) or gained with probability 1/2. Comparisons with too few
flipped images to fail whichever way they flipped are not tested (Tarone, Biometrics 46, 1990); the others are adjusted
by Holm's method, so the probability that a check fails though no model has become less robust is at most
`rule.significance`. A fall must reach `rule.floor` besides: with many images chance allows falls that nobody minds.

The same model on the same machine gives the same rows, hence no flipped image and no failure at all.

What makes another comparison, and is refused: any other attack, setting, data set, subset, seed, chunk size, class list,
preprocessing, number of models, or version of the attack code. Another model (weights, or the code of its network) is
refused as well, unless `rule.weights_may_change` says that the model is what is under test: then it is compared, and said.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from lrrobust.check.baseline import (
    Baseline,
    Measurement,
    ModelBaseline,
    Record,
    Rule,
    clean_accuracy,
    in_request_order,
    measure,
    protocol_of,
)
from lrrobust.errors import BaselineError
from lrrobust.formatting import format_count, format_eps
from lrrobust.norm import Norm
from lrrobust.report.notices import warnings_of
from lrrobust.results import Run
from lrrobust.stats import holm, mcnemar_p_value

#: Raised whenever a field of `CheckResult` is added, dropped or changes its meaning.
RESULT_SCHEMA_VERSION = 2

#: Keys of a model that say which one it is rather than how it sees the images.
_MODEL_HASHES = {"state_sha256": "weights", "code_sha256": "code"}
_MODEL_NAMES = {"name", "weights"}

Verdict = Literal["passed", "regressed", "another_comparison"]


class Flip(Record):
    """An image that was robust in one of both, and broken in the other."""

    index: int
    """Place in the data set."""
    key: str
    """`<class>/<file name>`."""
    outcome: str
    """What became of it in the fresh run, as in the rows' column of that name."""


class Comparison(Record):
    """One model under one attack at one eps, before and now."""

    model: str
    attack: str
    norm: Norm
    eps: float | None
    """Pixel units of [0, 1]; None: any distance."""
    n: int
    baseline_robust_accuracy: float
    robust_accuracy: float
    lost: tuple[Flip, ...]
    """Robust in the baseline, broken now."""
    gained: tuple[Flip, ...]
    p_value: float
    """McNemar's exact test, one-sided."""
    p_holm: float | None
    """Adjusted over all comparisons tested; None: too few flipped images to be tested."""
    is_regression: bool

    @property
    def shown_eps(self) -> str:
        """As people read it."""
        return format_eps(math.inf if self.eps is None else self.eps, self.norm)

    @property
    def fall(self) -> float:
        """Fraction by which robust accuracy fell; negative where it rose."""
        return (len(self.lost) - len(self.gained)) / self.n


class CleanAccuracy(Record):
    """One model without attack, before and now: for information, as a fall of it is one of robust accuracy too."""

    model: str
    n: int
    baseline: float | None
    """A fraction; None: the baseline does not say."""
    now: float


class CheckResult(Record):
    """What came of a check."""

    schema_version: int = RESULT_SCHEMA_VERSION
    baseline: str
    """Its file."""
    verdict: Verdict
    reason: str
    """One sentence."""
    rule: Rule
    differences: tuple[str, ...]
    """What makes it another comparison; empty otherwise."""
    notes: tuple[str, ...]
    """What a reader must know: a changed model, warnings of the run."""
    clean: tuple[CleanAccuracy, ...]
    """Of each model; empty for another comparison."""
    comparisons: tuple[Comparison, ...]
    """In the order of the baseline; empty for another comparison."""


def find_differences(baseline: Baseline, manifests: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[str]]:
    """What differs between a baseline and an evaluation, before or after it is run.

    Args:
        manifests: of the evaluation, in the order of its request.

    Returns:
        What makes it another comparison, and what is to be noted; a sentence each.
    """
    if len(manifests) != len(baseline.models):
        return [f"models: {len(baseline.models)} in the baseline, {len(manifests)} now"], []
    differences: list[str] = []
    notes: list[str] = []
    for of_model, manifest in zip(baseline.models, manifests, strict=True):
        protocol, moved = _same_images(baseline.protocol, protocol_of(manifest))
        notes += moved
        differences += _named_differences(baseline.protocol, protocol)
        before, now = of_model.model, manifest["model"]
        how_seen = [{k: v for k, v in m.items() if k not in _MODEL_HASHES.keys() | _MODEL_NAMES} for m in (before, now)]
        differences += _named_differences(*how_seen, prefix="model.")
        changed = [word for key, word in _MODEL_HASHES.items() if before[key] != now[key]]
        if not changed:
            continue
        said = f"{' and '.join(changed)} of {before['name']} changed"
        if before["name"] != now["name"]:
            said += f" (now {now['name']})"
        (notes if baseline.rule.weights_may_change else differences).append(said)
    return list(dict.fromkeys(differences)), list(dict.fromkeys(notes))


def _same_images(before: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[Mapping[str, Any], list[str]]:
    """The protocol of now with what of before lies around the images, where these are the same; and what to say of it."""
    was, found = before["dataset"], now["dataset"]
    if was["sha256"] != found["sha256"]:
        return now, []
    notes = []
    if was["name"] != found["name"]:
        notes.append(f"the data set is called {found['name']} now, {was['name']} in the baseline")
    left_out = [dataset.get("left_out_count", 0) for dataset in (found, was)]
    if left_out[0] != left_out[1]:
        notes.append(f"{left_out[0]} images of other classes are left out now, {left_out[1]} in the baseline")
    around = {key: was[key] for key in ("name", "left_out_count") if key in was}
    return {**now, "dataset": {**found, **around}}, notes


def compare(baseline: Baseline, runs: Sequence[Run], baseline_file: str) -> CheckResult:
    """Compares the runs of one evaluation with the baseline.

    Raises:
        StoreError, BaselineError: as `in_request_order`.
    """
    runs = in_request_order(runs)
    differences, notes = find_differences(baseline, [run.manifest for run in runs])
    if differences:
        return another_comparison(baseline, differences, baseline_file)
    for run in runs:
        notes += [f"{run.manifest['model']['name']}: {warning}" for warning in warnings_of(run)]
    flipped = list(_find_flips(baseline, runs))
    lost, gained = ([len(found[place]) for found in flipped] for place in (2, 3))
    p_values, adjusted = _test(lost, gained, baseline.rule)
    _, of_rises = _test(gained, lost, baseline.rule)
    comparisons = tuple(
        Comparison(
            model=model,
            attack=before.attack,
            norm=before.norm,
            eps=before.eps,
            n=before.n,
            baseline_robust_accuracy=before.robust_accuracy,
            robust_accuracy=now.robust_accuracy,
            lost=lost,
            gained=gained,
            p_value=float(p),
            p_holm=p_holm,
            is_regression=p_holm is not None
            and p_holm <= baseline.rule.significance
            # Whole images, so that 2 of 200 is a fall of 0.01.
            and len(lost) - len(gained) >= baseline.rule.floor * before.n - 1e-9,
        )
        for (model, before, lost, gained, now), p, p_holm in zip(flipped, p_values, adjusted, strict=True)
    )
    notes += _rises([c for c, p in zip(comparisons, of_rises) if p is not None and p <= baseline.rule.significance])
    verdict: Verdict = "regressed" if any(c.is_regression for c in comparisons) else "passed"
    return CheckResult(
        baseline=baseline_file,
        verdict=verdict,
        reason=_reason(comparisons, baseline),
        rule=baseline.rule,
        differences=(),
        notes=tuple(notes),
        comparisons=comparisons,
        clean=tuple(
            CleanAccuracy(
                model=str(run.manifest["model"]["name"]),
                n=of_model.measurements[0].n,
                baseline=of_model.clean_accuracy,
                now=clean_accuracy(run),
            )
            for of_model, run in zip(baseline.models, runs, strict=True)
        ),
    )


def another_comparison(baseline: Baseline, differences: Sequence[str], baseline_file: str) -> CheckResult:
    """The result where nothing can be compared."""
    advice = "rewrite it with --update if that is meant"
    if all(" changed" in difference for difference in differences):
        advice = "add --weights-may-change if the model is what is under test, or rewrite the baseline with --update"
    return CheckResult(
        baseline=baseline_file,
        verdict="another_comparison",
        rule=baseline.rule,
        differences=tuple(differences),
        notes=(),
        reason=f"not the comparison of the baseline: {'; '.join(differences)}; {advice}",
        comparisons=(),
        clean=(),
    )


def smallest_noticed_fall(baseline: Baseline) -> int | None:
    """Fewest images whose loss at one comparison of any model fails a check, none gained; None: some model has not so many."""
    count = sum(len(of_model.measurements) for of_model in baseline.models)
    needed = _images_to_lose(baseline.rule, baseline.models[0].measurements[0].n, count)
    return needed if all(needed <= _most_robust(of_model) for of_model in baseline.models) else None


def _images_to_lose(rule: Rule, n: int, count: int) -> int:
    """Of n images at one of `count` comparisons, none gained, for a check to fail."""
    return max(math.ceil(math.log2(count) - math.log2(rule.significance) - 1e-9), math.ceil(rule.floor * n - 1e-9), 1)


def _most_robust(of_model: ModelBaseline) -> int:
    return max(int(measurement.is_robust().sum()) for measurement in of_model.measurements)


def require_sensitivity(baseline: Baseline, baseline_file: str) -> None:
    """Refuses a comparison that would pass whatever became of a model.

    Raises:
        BaselineError: a model has nowhere as many robust images as would have to be lost.
    """
    for of_model in baseline.models:
        most, n = _most_robust(of_model), of_model.measurements[0].n
        if most < _images_to_lose(baseline.rule, n, 1):
            others = ", or leave that model out" if len(baseline.models) > 1 else ""
            raise BaselineError(
                f"a check against {baseline_file} could never fail: at most {most} of its {n} images are robust at any attack "
                f"and eps for {of_model.name}, and so few may be lost (significance {baseline.rule.significance:g}, floor "
                f"{100 * baseline.rule.floor:g} points); make a baseline of more images or smaller eps, or lower the "
                f"floor{others}"
            )


def _find_flips(
    baseline: Baseline, runs: Sequence[Run]
) -> Iterator[tuple[str, Measurement, tuple[Flip, ...], tuple[Flip, ...], Measurement]]:
    for of_model, run in zip(baseline.models, runs, strict=True):
        fresh = {measurement.key: (measurement, rows) for measurement, rows in measure(run)}
        if fresh.keys() != {before.key for before in of_model.measurements}:
            raise BaselineError(
                f"the measurements of {of_model.name} in the baseline are not those of its attacks: restore the file, "
                "or rewrite it with --update"
            )
        for before in of_model.measurements:
            now, rows = fresh[before.key]
            was_robust, is_robust = before.is_robust(), now.is_robust()
            lost, gained = (
                tuple(
                    Flip(index=int(index), key=str(key), outcome=str(outcome))
                    for index, key, outcome in zip(*(rows[c].to_numpy(object)[which] for c in ("index", "key", "outcome")))
                )
                for which in (was_robust & ~is_robust, ~was_robust & is_robust)
            )
            yield str(run.manifest["model"]["name"]), before, lost, gained, now


def _test(lost: Sequence[int], gained: Sequence[int], rule: Rule) -> tuple[np.ndarray, list[float | None]]:
    """Of more lost than gained: p-values, and Holm over those that could fail at all: k flips give none below 2^-k."""
    p_values = mcnemar_p_value(lost, gained, alternative="greater")
    is_tested = [2.0 ** -(ours + theirs) <= rule.significance for ours, theirs in zip(lost, gained, strict=True)]
    adjusted = iter(holm(p_values[is_tested]) if any(is_tested) else ())
    return p_values, [float(next(adjusted)) if tested else None for tested in is_tested]


def _rises(risen: Sequence[Comparison]) -> Iterator[str]:
    """Gains never fail a check, but whoever makes attacks fail gains too."""
    for model in dict.fromkeys(c.model for c in risen):
        most = min((c for c in risen if c.model == model), key=lambda c: c.fall)
        yield (
            f"robust accuracy of {model} rose beyond chance, by {-100 * most.fall:.1f} points under {most.attack} at eps "
            f"{most.shown_eps} (as where attacks fail): see the checks of `lrrobust eval` before --update"
        )


def _reason(comparisons: Sequence[Comparison], baseline: Baseline) -> str:
    rule = baseline.rule
    fallen = [c for c in comparisons if c.is_regression]
    how = f"significance {rule.significance:g}, floor {100 * rule.floor:g} points"
    if fallen:
        worst = max(fallen, key=lambda c: c.fall)
        images = {(c.model, flip.index) for c in fallen for flip in c.lost}
        return (
            f"robust accuracy fell in {len(fallen)} of {len(comparisons)} comparisons, most by {100 * worst.fall:.1f} points "
            f"({worst.attack} at eps {worst.shown_eps}), {len(images)} images lost ({how})"
        )
    flips = sum(len(c.lost) + len(c.gained) for c in comparisons)
    noticed = smallest_noticed_fall(baseline)
    able = "no fall at all: too few images are robust in the baseline"
    if noticed is not None:
        able = f"a fall of {100 * noticed / comparisons[0].n:.1f} points"
    return (
        f"no fall beyond chance in {format_count(len(comparisons), 'comparison')} on "
        f"{format_count(comparisons[0].n, 'image')}, {flips} flips "
        f"({how}; sure to notice {able})"
    )


def _named_differences(before: Any, now: Any, prefix: str = "") -> list[str]:
    """`attacks.0.steps: 20 in the baseline, 10 now`, one for each difference."""
    path = prefix.rstrip(".")
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        keys = list(dict.fromkeys([*before, *now]))
        return [d for k in keys for d in _named_differences(before.get(k), now.get(k), f"{prefix}{k}.")]
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        return [d for k, pair in enumerate(zip(before, now)) for d in _named_differences(*pair, f"{prefix}{k}.")]
    # Not ==, which takes true for 1.
    if type(before) is type(now) and before == now:
        return []
    return [f"{path}: {_brief(before)} in the baseline, {_brief(now)} now"]


def _brief(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:12]}..." if len(text) == 64 else f"{text[:37]}..."
