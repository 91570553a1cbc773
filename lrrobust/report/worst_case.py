"""One row a model: clean accuracy, and robust accuracy under the worst case of all its runs, as papers print it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from pydantic_core import PydanticCustomError

from lrrobust.diagnostics.table import RESULTS, diagnostics_table
from lrrobust.eps import parse_eps
from lrrobust.errors import ConfigError
from lrrobust.formatting import format_eps, format_percent
from lrrobust.norm import NORMS, Norm
from lrrobust.report.naming import by_images, name_models, name_runs
from lrrobust.report.outcomes import outcomes
from lrrobust.results import Run, manifest_value
from lrrobust.stats import wilson_interval
from lrrobust.tables import Cell, Column, Table

#: A norm, and an eps above 0 in pixel units of [0, 1].
Budget = tuple[Norm, float]


@dataclass(frozen=True)
class WorstCases:
    """The table of one set of images, and what its reader must know."""

    table: Table
    how_to_read: str


@dataclass(frozen=True)
class _Model:
    """What all runs of one network did to the same images.

    Attributes:
        own_name: what runs call it, where `name` is a label.
        names: of its runs.
        attacks: those of each norm, sorted.
        breaking_eps: by norm (N,), the smallest eps at which any of them breaks an image; NaN where one has not finished it.
        budgets: that some attack of the norm has rows of.
    """

    name: str
    own_name: str
    weights: str
    parameters: str
    names: tuple[str, ...]
    is_complete: bool
    attacks: Mapping[str, tuple[str, ...]]
    is_clean_correct: np.ndarray
    breaking_eps: Mapping[str, np.ndarray]
    budgets: frozenset[Budget]


def parse_budget(text: str) -> Budget:
    """Read `linf:8/255`.

    Raises:
        ConfigError: it is not a norm and an eps above 0.

    >>> parse_budget("l2:0.5")
    ('l2', 0.5)
    """
    norm, _, eps = text.partition(":")
    try:
        budget = parse_eps(eps)
    except PydanticCustomError:
        budget = 0.0
    if norm not in NORMS or not budget > 0:
        raise ConfigError(f"expected a budget such as linf:8/255 (norms: {', '.join(NORMS)}), found {text!r}")
    return norm, budget


def worst_cases_by_images(
    runs: Sequence[Run], budgets: Sequence[Budget] = (), labels: Mapping[Run, str] | None = None
) -> dict[str, WorstCases]:
    """`worst_cases` for each set of images, by its sha256; those of which no model has a row are left out.

    Raises:
        ConfigError: a budget that no run has.
    """
    groups = by_images(name_runs(runs))
    found = {sha256: worst_cases(of_images, budgets, labels) for sha256, of_images in groups.items()}
    found = {sha256: of_images for sha256, of_images in found.items() if of_images.table.rows}
    for norm, eps in budgets:
        heading = _heading(norm, eps)
        if all(row[_place(each.table, heading)].text == "-" for each in found.values() for row in each.table.rows):
            raise ConfigError(f"--budget {heading.replace(' ', ':')}: no run has rows of it; name an eps that was attacked")
    return found


def worst_cases(runs: Mapping[str, Run], budgets: Sequence[Budget] = (), labels: Mapping[Run, str] | None = None) -> WorstCases:
    """Of the runs on one set of images, by name; those that judge images made on another model are left out.

    Runs of one network count as one: an image is broken at eps once any attack of the norm, in any of them, has a verified
    adversarial image within eps. Images count that all attacks of the norm have finished.

    Args:
        runs: name -> run.
        budgets: the columns; without, every finite budget above 0 that some run has.
        labels: what to call the network of a run instead of its name.
    """
    models = _pool(runs, labels or {})
    every = {each for model in models for each in model.budgets}
    columns = list(dict.fromkeys(budgets)) or sorted(every, key=lambda each: (NORMS.index(each[0]), each[1]))
    alike = {norm: len({model.attacks.get(norm) for model in models}) == 1 for norm, _ in columns}
    names = [(model.name, model.weights) for model in models]
    shown = [Column("model", True), Column("weights", True)]
    if len(set(names)) < len(names):
        shown.append(Column("parameters", True))
    shown += [Column("n"), Column("clean %"), *(Column(_heading(*each)) for each in columns)]
    if not all(alike.values()):
        shown.append(Column("attacks", True))
    rows, widest = [], 0.0
    for model in models:
        texts = {"model": model.name, "weights": model.weights, "parameters": model.parameters, "attacks": _list(model.attacks)}
        cells = {heading: Cell(text, text) for heading, text in texts.items()}
        n = len(model.is_clean_correct)
        cells["n"] = Cell(f"{n}" if model.is_complete else f"{n}*", n)
        cells["clean %"] = _percent(model.is_clean_correct.mean())
        for norm, eps in columns:
            breaking = model.breaking_eps.get(norm, np.empty(0))
            breaking = breaking[~np.isnan(breaking)]
            if (norm, eps) not in model.budgets or not len(breaking):
                cells[_heading(norm, eps)] = Cell("-", np.inf)
                continue
            robust = int((breaking > eps).sum())
            low, high = wilson_interval(robust, len(breaking))
            widest = max(widest, robust / len(breaking) - low, high - robust / len(breaking))
            cells[_heading(norm, eps)] = _percent(robust / len(breaking))
        rows.append([cells[column.heading] for column in shown])
    return WorstCases(Table(shown, rows), " ".join(_how_to_read(runs, models, alike, widest)))


def _pool(runs: Mapping[str, Run], labels: Mapping[Run, str]) -> list[_Model]:
    called = name_models(runs)
    groups: dict[tuple[str | None, ...], list[str]] = {}
    for name, run in runs.items():
        if run.manifest.get("surrogate") is None and len(run.rows):
            model = manifest_value(run, "model")
            keys = ("weights", "state_sha256", "code_sha256", "input_size", "resize_size", "interpolation")
            groups.setdefault((called[name], *(str(model.get(key)) for key in keys)), []).append(name)
    return [_model(called[names[0]], {name: runs[name] for name in names}, labels) for names in groups.values()]


def _model(name: str, runs: Mapping[str, Run], labels: Mapping[Run, str]) -> _Model:
    first = next(iter(runs.values()))
    images = np.unique(np.concatenate([outcomes(run)["index"].to_numpy() for run in runs.values()]))
    correct = np.ones(len(images), dtype=bool)
    breaking: dict[str, np.ndarray] = {}
    attacks: dict[str, set[str]] = {}
    budgets: set[Budget] = set()
    for run in runs.values():
        of_run = outcomes(run)
        correct[np.searchsorted(images, of_run["index"].to_numpy()[~of_run["is_clean_correct"].to_numpy()])] = False
        for (_, norm), rows in of_run.groupby(["attack", "norm"], sort=False):
            # An image without a row of this attack is not finished: NaN, which spreads.
            found = np.full(len(images), np.nan)
            place = np.searchsorted(images, rows["index"].to_numpy())
            found[place] = np.inf
            np.minimum.at(found, place, rows["breaking_eps"].to_numpy())
            breaking[norm] = found if norm not in breaking else np.minimum(breaking[norm], found)
            budgets |= {(norm, float(eps)) for eps in rows["eps"].unique() if 0 < eps < np.inf}
        for spec in manifest_value(run, "attacks"):
            attacks.setdefault(spec["norm"], set()).add(spec["name"])
            if not (of_run["attack"] == spec["name"]).any():
                breaking[spec["norm"]] = np.full(len(images), np.nan)
    weights = manifest_value(first, "model", "weights")
    return _Model(
        name=labels.get(first, name),
        own_name=name,
        weights="-" if not weights else str(weights),
        parameters=str(manifest_value(first, "model").get("state_sha256"))[:8],
        names=tuple(runs),
        is_complete=all(run.is_complete for run in runs.values()),
        attacks={norm: tuple(sorted(of_norm)) for norm, of_norm in attacks.items()},
        is_clean_correct=correct,
        breaking_eps=breaking,
        budgets=frozenset(budgets),
    )


def _how_to_read(runs: Mapping[str, Run], models: Sequence[_Model], alike: Mapping[str, bool], widest: float) -> list[str]:
    texts = [
        "Accuracies in percent of all images; an image misclassified without attack counts as broken. Robust accuracy at a "
        "budget is under the worst case of all attacks of its norm in all runs of the model: what any of them breaks is broken."
    ]
    if models and all(alike.values()):
        texts.append(f"Attacks: {_list({norm: models[0].attacks.get(norm, ()) for norm in alike})}.")
    elif models:
        texts.append("The models did not meet the same attacks, which more of them can only lower: compare with care.")
    texts.append(f"95 % Wilson intervals reach at most {100 * widest:.1f} points to either side.")
    texts += [
        f"{model.name} is {model.own_name} with the parameters {model.parameters} (sha256)."
        for model in models
        if model.name != model.own_name
    ]
    if not all(model.is_complete for model in models):
        texts.append("* not complete: only images that all attacks of a norm have finished count.")
    table = diagnostics_table(runs)
    failed = {row[0].text for row in table.rows if row[3].text == RESULTS[False]}
    # A run of other rules has a row that says so, and no check that counts.
    checked = {row[0].text for row in table.rows if row[1].text != "all"}
    for said, of_runs in (
        ("Checks of attacks failed for", failed),
        ("Whether attacks worked was not looked into for all runs of", set(runs) - checked),
    ):
        if doubtful := [model.name for model in models if of_runs & set(model.names)]:
            texts.append(f"{said} {', '.join(dict.fromkeys(doubtful))}: robust accuracies may be too high.")
    return texts


def _heading(norm: str, eps: float) -> str:
    return f"{norm} {format_eps(eps, norm)}"


def _place(table: Table, heading: str) -> int:
    return [column.heading for column in table.columns].index(heading)


def _list(attacks: Mapping[str, Sequence[str]]) -> str:
    return "; ".join(f"{', '.join(of_norm)} ({norm})" for norm, of_norm in attacks.items() if of_norm)


def _percent(fraction: float) -> Cell:
    return Cell(format_percent(fraction), float(fraction))
