"""From runs to evidence: both models' outcomes on the same images, as arrays.

Every image is reduced to its breaking eps under each attack: the smallest eps at which a row proves it broken,
0 where it is wrong when clean, infinity where nothing broke it. It survives eps exactly when its breaking eps is
larger.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lrrobust.diagnostics.records import Diagnostic, load_diagnostics
from lrrobust.errors import ConfigError
from lrrobust.formatting import format_eps
from lrrobust.norm import Norm
from lrrobust.report.naming import WORST_CASE
from lrrobust.results import Run, breaking_eps, group_runs, manifest_value, texts
from lrrobust.transfer import surrogate_of
from lrrobust.verdict.records import Claim, NotJudged, Population, is_unbounded

#: What of a model's manifest decides which images it sees, beside the data set.
INPUT_KEYS = ("input_size", "resize_size", "interpolation", "num_classes", "classes_sha256")

#: What of it tells networks of one name apart.
NETWORK_KEYS = ("state_sha256", "code_sha256")


@dataclass(frozen=True)
class AttackOutcomes:
    """What one attack did to N images of one model.

    Attributes:
        eps: the ladder, ascending, infinity last where the attack has such rows.
        breaking_eps: (N,); NaN for images that the attack has not finished.
        rises: for each neighbouring pair of eps, how many images were robust and then broken, and how many broken
            and then robust, (len(eps) - 1, 2).
        rejected: images for which only proposals outside the ball or the box were made, at some eps.
        is_cumulative: what earlier attacks of a suite had broken was not attacked again, and counts as broken.
    """

    name: str
    norm: Norm
    eps: tuple[float, ...]
    breaking_eps: NDArray[np.float64]
    rises: NDArray[np.int64]
    rejected: int
    is_cumulative: bool

    @property
    def has_distances(self) -> bool:
        """Whether `breaking_eps` are distances of the attack's own images, not steps of a ladder.

        What an earlier attack of the suite broke has none of this attack's.
        """
        return bool(np.isinf(self.eps[-1])) and not self.is_cumulative


@dataclass(frozen=True)
class ModelOutcomes:
    """What runs of one model say, image by image.

    Attributes:
        name: as the claim calls the model.
        runs: on these images, or on more of the same data set.
        images: (N,) identities, class and key; sorted, each once.
        is_clean_correct: (N,).
        labels, clean_predictions: (N,) class numbers.
        contradictions: images that runs predict differently when clean.
        attacks: those of all runs; one that several runs made counts as one, broken by any of them.
        shared: (n,) places in `images` of those that the other side of the evidence has, too.
    """

    name: str
    runs: tuple[Run, ...]
    images: NDArray[np.object_]
    is_clean_correct: NDArray[np.bool_]
    labels: NDArray[np.int64]
    clean_predictions: NDArray[np.int64]
    contradictions: int
    attacks: tuple[AttackOutcomes, ...]
    shared: NDArray[np.int64]

    @cached_property
    def diagnostics(self) -> tuple[tuple[Diagnostic, ...] | None, ...]:
        """Of each run; None where a run carries none."""
        found = (load_diagnostics(run) for run in self.runs)
        return tuple(None if each is None else each.results for each in found)


@dataclass(frozen=True)
class Evidence:
    """Both models' runs that judge a claim, and the images they share."""

    claim: Claim
    treatment: ModelOutcomes
    control: ModelOutcomes
    #: Runs that judge images made on other models; no comparison rests on them.
    transfer: tuple[Run, ...] = ()
    #: Evidence on some of these images, where more attacks were made.
    on_fewer: tuple[Evidence, ...] = ()
    #: All runs on the data set, also on images that the other model has none on.
    all_runs: tuple[Run, ...] = ()

    @property
    def sides(self) -> tuple[ModelOutcomes, ModelOutcomes]:
        return self.treatment, self.control

    @property
    def runs(self) -> tuple[Run, ...]:
        """Of both."""
        return (*self.treatment.runs, *self.control.runs)

    @property
    def images(self) -> NDArray[np.object_]:
        """Those that they share, (n,)."""
        return self.treatment.images[self.treatment.shared]

    @property
    def is_clean_correct(self) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Which of these either classifies correctly, (n,)."""
        return tuple(side.is_clean_correct[side.shared] for side in self.sides)

    @cached_property
    def populations(self) -> Mapping[Population, NDArray[np.bool_]]:
        """Which of these belong to each population, (n,)."""
        treatment, control = self.is_clean_correct
        return {
            "all": np.ones(len(treatment), dtype=bool),
            "both_correct": treatment & control,
            "matched_accuracy": match_accuracy(treatment, control, self.images),
        }

    @cached_property
    def attacks(self) -> tuple[PairedAttack, ...]:
        """The attacks that judge the claim and that both models have, then the worst case of norms with several."""
        theirs = {(attack.name, attack.norm): attack for attack in self.control.attacks}
        single = [
            PairedAttack(
                attack.name,
                attack.norm,
                tuple(sorted(set(attack.eps) & set(other.eps))),
                attack.breaking_eps[self.treatment.shared],
                other.breaking_eps[self.control.shared],
                attack.is_cumulative or other.is_cumulative,
                attack.has_distances and other.has_distances,
            )
            for attack in self.treatment.attacks
            if (other := theirs.get((attack.name, attack.norm))) is not None
            and (self.claim.attacks is None or attack.name in self.claim.attacks)
            and (self.claim.eps is None or attack.norm in self.claim.eps)
        ]
        worst = []
        for norm in dict.fromkeys(attack.norm for attack in single):
            of_norm = [attack for attack in single if attack.norm == norm]
            if len(of_norm) > 1:
                worst.append(
                    PairedAttack(
                        WORST_CASE,
                        norm,
                        tuple(sorted({eps for attack in of_norm for eps in attack.eps})),
                        # NaN spreads: an image counts once every attack has finished it.
                        np.minimum.reduce([attack.treatment for attack in of_norm]),
                        np.minimum.reduce([attack.control for attack in of_norm]),
                        # The nearest of distances is one; of distances and steps of a ladder it is neither.
                        has_distances=all(attack.has_distances for attack in of_norm),
                    )
                )
        return tuple(single + worst)

    @property
    def decisive(self) -> tuple[PairedAttack, ...]:
        """For each norm the worst case, or its only attack."""
        return tuple({attack.norm: attack for attack in self.attacks}.values())

    def ladder(self, attack: PairedAttack) -> tuple[float, ...]:
        """The eps at which an attack judges the claim: those asked for, else all that bound it."""
        if self.claim.eps is not None:
            return tuple(eps for eps in self.claim.eps[attack.norm] if eps in attack.eps)
        return tuple(eps for eps in attack.eps if eps > 0 and not is_unbounded(eps, attack.norm))


@dataclass(frozen=True)
class PairedAttack:
    """One attack, or the worst case, on the shared images: breaking eps (n,) of both models."""

    name: str
    norm: Norm
    eps: tuple[float, ...]
    treatment: NDArray[np.float64]
    control: NDArray[np.float64]
    is_cumulative: bool = False
    #: As in `AttackOutcomes`, of both models; of the worst case, where every attack of the norm has them.
    has_distances: bool = False

    @property
    def is_finished(self) -> NDArray[np.bool_]:
        """Images that the attack has finished on both models, (n,)."""
        return ~(np.isnan(self.treatment) | np.isnan(self.control))


def match_accuracy(treatment: NDArray[np.bool_], control: NDArray[np.bool_], images: NDArray[np.object_]) -> NDArray[np.bool_]:
    """Images on which both models are equally accurate when clean; (N,) for (N,) correct or not, and (N,) names.

    Of the images that only the more accurate model classifies correctly, as many are discarded as it has more than
    the other: those whose names have the smallest SHA-256, so that nothing of the images or the attacks decides.

    Its limits: it says how the two compare at one accuracy, not how the more accurate would have done had it been
    trained to less; the images that only one model classifies correctly lie near decision boundaries, and discarding
    some at random keeps the others; which are discarded is arbitrary, and with few images another hash would move the
    numbers within their intervals.
    """
    treatment_only, control_only = np.flatnonzero(treatment & ~control), np.flatnonzero(control & ~treatment)
    more = treatment_only if len(treatment_only) > len(control_only) else control_only
    excess = abs(len(treatment_only) - len(control_only))
    digests = np.array([hashlib.sha256(images[place].encode()).hexdigest() for place in more], dtype=object)
    keep = np.ones(len(treatment), dtype=bool)
    keep[more[np.argsort(digests)[:excess]]] = False
    return keep


def collect_evidence(claim: Claim, runs: Sequence[Run]) -> tuple[list[Evidence], list[NotJudged]]:
    """Pairs the runs of the claim's models, data set by data set and subset by subset.

    Every set of images that both models have a run on is judged by itself, by these runs and by those on more images of
    the data set that hold all of these: costly attacks may be made on a part of the images, and are then judged there
    together with the others. Where the two models share no subset of a data set, the images in common judge.
    Weights are paired by name, and a single one with a single other. Runs on images made on another model are left to
    the safeguards: an attack made on one side alone would be no fair comparison.

    Returns:
        Evidence, those with most images first, and for what there is none, why.

    Raises:
        StoreError: a manifest does not say what was evaluated.
    """
    transfer = tuple(run for run in runs if surrogate_of(run) is not None)
    runs = [run for run in runs if surrogate_of(run) is None]
    treatment, control = _sides(claim, runs)
    if both := [run.folder.name for run in treatment if run in control]:
        return [], [
            NotJudged(claim=claim.name, reason=f"Treatment and control are the same: {', '.join(both)} is a run of both.")
        ]
    missing = [name for name, found in ((claim.treatment, treatment), (claim.control, control)) if not found]
    if missing:
        reason = f"No run of {' or '.join(missing)} is among those given, which are of {_present(runs)}."
        return [], [NotJudged(claim=claim.name, reason=reason)]
    datasets = {dataset_of(run) for run in treatment} & {dataset_of(run) for run in control}
    if claim.dataset is not None:
        datasets &= {claim.dataset}
    if not datasets:
        where = f"on {claim.dataset}" if claim.dataset else "on a common data set"
        reason = f"The runs of {claim.treatment} and {claim.control} are not {where}."
        return [], [NotJudged(claim=claim.name, reason=reason)]

    found: list[Evidence] = []
    refused: list[NotJudged] = []
    idle = [run for run in treatment + control if claim.dataset in (None, dataset_of(run))]
    for dataset in sorted(datasets):
        on_dataset = [[run for run in side if dataset_of(run) == dataset] for side in (treatment, control)]
        for pair in _pair_weights(claim, *on_dataset):
            of_pair, of_claim = [], []
            for sha256, images, ours, theirs in _subsets(*pair):
                evidence = _join(claim, images, ours, theirs, transfer)
                problem = _lacks(evidence)
                if problem is None:
                    of_pair.append(evidence)
                    # Images other than the claim's do not judge it, but may show that attacks failed.
                    problem = _is_other_subset(claim, sha256, (*ours, *theirs))
                if problem is None:
                    of_claim.append(evidence)
                else:
                    refused.append(NotJudged(claim=claim.name, reason=f"On {dataset}, {problem}"))
                idle = [run for run in idle if run not in (*ours, *theirs)]
            of_data = tuple(run for run in runs if dataset_of(run) == dataset)
            found += [replace(each, on_fewer=_on_fewer(each, of_pair), all_runs=of_data) for each in of_claim]
    if idle:
        names = ", ".join(run.folder.name for run in idle)
        reason = f"The other model has no run on the same images with weights of the same name as {names}: left out."
        refused.append(NotJudged(claim=claim.name, reason=reason))
    return sorted(found, key=lambda evidence: -len(evidence.images)), refused


def gather(runs: Sequence[Run], images: frozenset[str] | None = None, name: str | None = None) -> ModelOutcomes:
    """The outcomes of the runs of one model, at least one run, on the images named; None: on all.

    `name` is what the model is called; None: as in the runs.
    """
    rows = pd.concat([_plain_rows(run, place) for place, run in enumerate(runs)], ignore_index=True)
    if images is not None:
        rows = rows[rows["image"].isin(images)].reset_index(drop=True)
    codes, names = pd.factorize(rows["image"], sort=True)
    correct = np.ones(len(names), dtype=bool)
    correct[codes[~rows["is_clean_correct"].to_numpy()]] = False
    labels, predictions = np.zeros((2, len(names)), dtype=np.int64)
    labels[codes], predictions[codes] = rows["label"].to_numpy(), rows["clean_prediction"].to_numpy()
    differs = rows["clean_prediction"].to_numpy() != predictions[codes]
    attacks = []
    for (attack, norm), places in rows.groupby(["attack", "norm"], sort=False).indices.items():
        of_attack, image = rows.iloc[places], codes[places]
        breaking = np.full(len(names), np.nan)
        breaking[image] = np.inf
        np.minimum.at(breaking, image, of_attack["breaking_eps"].to_numpy())
        attacks.append(
            AttackOutcomes(
                attack,
                norm,
                tuple(np.unique(of_attack["eps"]).tolist()),
                breaking,
                _rises(of_attack, image),
                len(np.unique(image[(of_attack["outcome"] == "rejected").to_numpy()])),
                bool((of_attack["outcome"] == "broken_by_earlier_attack").any()),
            )
        )
    contradictions = len(np.unique(codes[differs]))
    return ModelOutcomes(
        model_of(runs[0]) if name is None else name,
        tuple(runs),
        np.asarray(names, dtype=object),
        correct,
        labels,
        predictions,
        contradictions,
        tuple(attacks),
        np.arange(len(names)),
    )


def model_of(run: Run) -> str:
    return manifest_value(run, "model", "name")


def dataset_of(run: Run) -> str:
    return manifest_value(run, "dataset", "name")


def _plain_rows(run: Run, place: int) -> pd.DataFrame:
    """The columns that count, in plain dtypes."""
    rows = run.rows
    return pd.DataFrame(
        {
            "run": place,
            "image": _image_names(rows),
            "attack": texts(rows["attack"]),
            "norm": texts(rows["norm"]),
            "eps": rows["eps"].to_numpy(np.float64),
            "is_clean_correct": rows["is_clean_correct"].to_numpy(bool),
            "is_broken": rows["is_broken"].to_numpy(bool),
            "outcome": texts(rows["outcome"]),
            "label": rows["label"].to_numpy(np.int64),
            "clean_prediction": rows["clean_prediction"].to_numpy(np.int64),
            "breaking_eps": breaking_eps(rows),
        }
    )


def _image_names(rows: pd.DataFrame) -> NDArray[np.object_]:
    # The class tells apart images of equal names; labels depend on the model's list of classes.
    return (rows["wnid"] + "\n" + rows["key"]).to_numpy(object)


def _rises(rows: pd.DataFrame, image: NDArray[np.int64]) -> NDArray[np.int64]:
    run, eps, is_broken = rows["run"].to_numpy(), rows["eps"].to_numpy(), rows["is_broken"].to_numpy()
    order = np.lexsort((eps, image, run))
    run, image, eps, is_broken = run[order], image[order], eps[order], is_broken[order]
    is_step = (image[1:] == image[:-1]) & (run[1:] == run[:-1])
    ladder = np.unique(eps)
    step = np.searchsorted(ladder, eps[:-1])
    counts = np.zeros((len(ladder), 2), dtype=np.int64)
    np.add.at(counts[:, 0], step[is_step & ~is_broken[:-1] & is_broken[1:]], 1)
    np.add.at(counts[:, 1], step[is_step & is_broken[:-1] & ~is_broken[1:]], 1)
    return counts[:-1]


def _subsets(treatment: list[Run], control: list[Run]) -> list[tuple[str | None, frozenset[str] | None, list[Run], list[Run]]]:
    """Sets of images (None: all there are) of one data set that both models have runs on, and the runs that hold them.

    Before each its hash; None where the models share no set.
    """
    ours, theirs = (group_runs(side, "dataset", "sha256") for side in (treatment, control))
    shared = [sha256 for sha256 in ours if sha256 in theirs]
    if not shared:
        return [(None, None, treatment, control)]
    if len({*ours, *theirs}) == 1:
        return [(shared[0], None, treatment, control)]
    held = [(run, frozenset(_image_names(run.rows))) for run in treatment + control]
    found = []
    for sha256 in shared:
        own = [*ours[sha256], *theirs[sha256]]
        images = frozenset().union(*(names for run, names in held if run in own))
        # A run on other images of the same names is none on more images.
        holding = [run for run, names in held if run in own or images < names]
        sides = ([run for run in side if run in holding] for side in (treatment, control))
        found.append((sha256, images, *sides))
    return found


def _on_fewer(evidence: Evidence, others: Sequence[Evidence]) -> tuple[Evidence, ...]:
    """On some of its images, and maybe others; whoever holds all of them made no attack that it lacks."""
    images = set(evidence.images)
    held = ((other, set(other.images)) for other in others)
    return tuple(other for other, theirs in held if images & theirs and not images <= theirs)


def is_of(run: Run, side: str) -> bool:
    """Whether a run is of what one side of a claim names: a model, or MODEL@WEIGHTS.

    WEIGHTS is their name as runs keep it, or the first digits, at least 8, of `state_sha256` in the manifest, which
    tell apart files whose weights have one name.
    """
    model = model_of(run)
    weights = side.removeprefix(f"{model}@")
    if side == model or weights == side:
        return side == model
    has_digits = bool(re.fullmatch("[0-9a-f]{8,64}", weights)) and _state_of(run).startswith(weights)
    return has_digits or weights == _weights_of(run)


def label_runs(given: Sequence[str], runs: Sequence[Run]) -> dict[Run, str]:
    """What each run's network is to be called, from `MODEL=TEXT` or `MODEL@WEIGHTS=TEXT`, as a claim names a side.

    Raises:
        ConfigError: a label that is of no network or of several, is empty, or would take one for another.
    """
    labels: dict[Run, str] = {}
    for each in given:
        side, _, text = each.partition("=")
        of_side = [run for run in runs if model_of(run) == side] or [run for run in runs if is_of(run, side)]
        if not side or not text.strip():
            raise ConfigError(f'--label {each!r}: expected MODEL=TEXT, as in resnet50="ResNet-50 (ours)"')
        if not of_side:
            raise ConfigError(f"--label {each!r}: no run is of {side}; the runs are of {_present(runs)}")
        if len({(model_of(run), _weights_of(run), _state_of(run)) for run in of_side}) > 1:
            raise ConfigError(f"--label {each!r}: {side} is more than one network; give each its own, of {_present(of_side)}")
        others = {model_of(run) for run in runs} - {model_of(run) for run in of_side}
        others |= {called for run, called in labels.items() if run not in of_side}
        if text in others:
            raise ConfigError(f"--label {each!r}: another model is called {text!r} already; choose another label")
        labels |= dict.fromkeys(of_side, text)
    return labels


def _weights_of(run: Run) -> str | None:
    return manifest_value(run, "model", "weights")


def _state_of(run: Run) -> str:
    return str(manifest_value(run, "model").get("state_sha256"))


def _present(runs: Sequence[Run]) -> str:
    """What sides could be called, by the hash where the name of the weights tells too little."""
    states: dict[tuple[str, str | None], set[str]] = {}
    for run in runs:
        states.setdefault((model_of(run), _weights_of(run)), set()).add(_state_of(run)[:8])
    names = [
        f"{model}@{weights}" if weights and len(of) == 1 else f"{model}@{state}"
        for (model, weights), of in states.items()
        for state in sorted(of)
    ]
    return ", ".join(sorted(dict.fromkeys(names))) or "no model by itself"


def _sides(claim: Claim, runs: Sequence[Run]) -> tuple[list[Run], list[Run]]:
    """Runs of the treatment, and of the control; where one names a model and the other weights of it, each its own."""
    sides = []
    for side in (claim.treatment, claim.control):
        of_model = [run for run in runs if model_of(run) == side]  # whatever its name holds
        sides.append((of_model or [run for run in runs if is_of(run, side)], bool(of_model)))
    (treatment, is_any), (control, is_any_control) = sides
    if is_any and not is_any_control:
        treatment = [run for run in treatment if run not in control]
    if is_any_control and not is_any:
        control = [run for run in control if run not in treatment]
    return treatment, control


def _pair_weights(claim: Claim, treatment: list[Run], control: list[Run]) -> list[tuple[list[Run], list[Run]]]:
    """Runs of both, grouped by the name of the weights; a single one, or one that the claim names, goes with every other."""
    ours, theirs = (group_runs(side, "model", "weights") for side in (treatment, control))
    if len(ours) == len(theirs) == 1:
        return [(treatment, control)]
    if any(model_of(runs[0]) != side for runs, side in ((treatment, claim.treatment), (control, claim.control)) if runs):
        return [(of_treatment, of_control) for of_treatment in ours.values() for of_control in theirs.values()]
    return [(ours[name], theirs[name]) for name in ours if name in theirs]


def _join(
    claim: Claim, images: frozenset[str] | None, treatment: list[Run], control: list[Run], transfer: tuple[Run, ...]
) -> Evidence:
    ours, theirs = gather(treatment, images, claim.treatment), gather(control, images, claim.control)
    _, our_places, their_places = np.intersect1d(ours.images, theirs.images, assume_unique=True, return_indices=True)
    return Evidence(claim, replace(ours, shared=our_places), replace(theirs, shared=their_places), transfer)


def _is_other_subset(claim: Claim, sha256: str | None, runs: Sequence[Run]) -> str | None:
    """How images differ from those that the claim asks for, by the manifests of their runs, as a sentence."""
    wanted = claim.subset
    if wanted is None:
        return None
    if sha256 is None:
        return f"the claim asks for the subset {wanted}; the models were evaluated on two others."
    dataset = next(run.manifest["dataset"] for run in runs if manifest_value(run, "dataset", "sha256") == sha256)
    drawn = dataset.get("subset")
    # Any seed draws the same where all are drawn.
    is_whole = drawn is not None and drawn.get("n") is None
    matches = (
        wanted.n in (None, dataset["n"])
        and sha256.startswith(wanted.sha256 or "")
        and (is_whole or all(asked in (None, (drawn or {}).get(key)) for key, asked in wanted.draw.items()))
    )
    if matches:
        return None
    return f"the claim asks for the subset {wanted}; these {dataset['n']} images (sha256 {sha256[:12]}) are another."


def _lacks(evidence: Evidence) -> str | None:
    """Why evidence cannot judge its claim at all, as a sentence."""
    claim = evidence.claim
    if not len(evidence.images):
        return "no image was evaluated with both models."
    shared = set.intersection(*({attack.name for attack in side.attacks} for side in evidence.sides))
    absent = sorted(set(claim.attacks or ()) - shared)
    if absent:
        return f"the claim asks for the attacks {', '.join(absent)}, which not both models were evaluated with."
    if not evidence.attacks:
        return "the models share no attack that judges the claim."
    for norm, ladder in (claim.eps or {}).items():
        attack = next((attack for attack in evidence.decisive if attack.norm == norm), None)
        if lacking := sorted(set(ladder) - set(attack.eps if attack is not None else ())):
            budgets = ", ".join(format_eps(eps, norm) for eps in lacking)
            return f"the claim asks for {norm} budgets that not both models were evaluated at: {budgets}."
    idle = [attack for attack in evidence.decisive if not evidence.ladder(attack) or not attack.is_finished.any()]
    if idle:
        return f"the models share no image and budget of the norm {idle[0].norm}."
    return None
