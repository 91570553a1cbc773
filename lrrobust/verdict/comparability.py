"""Were the two models of a claim treated alike, and can images and budgets tell them apart?"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from lrrobust.results import Run, manifest_value
from lrrobust.verdict.evidence import INPUT_KEYS, NETWORK_KEYS, Evidence, ModelOutcomes
from lrrobust.verdict.records import BOTH, Safeguard

#: Share of images that may be copies of others: too few to move a test.
COPIED_SHARE = 0.01

#: Share of images that runs of one network may predict differently when clean, as other hardware makes them.
CONTRADICTED_SHARE = 0.01


def check_comparability(evidence: Evidence) -> tuple[Safeguard, ...]:
    """What withholds any verdict, but for the last, which withholds *refuted* alone."""
    return (
        _same_images(evidence),
        _distinct_images(evidence),
        _one_network(evidence),
        _same_training(evidence),
        _same_configuration(evidence),
        _complete_runs(evidence),
        _clean_accuracy(evidence),
        _telling_eps(evidence),
    )


def _same_images(evidence: Evidence) -> Safeguard:
    n = len(evidence.images)
    lost = {side.name: len(side.images) - n for side in evidence.sides}
    # Hashes cover what the images hold: names alone would let another version of the images pass for the same.
    ours, theirs = ({manifest_value(run, "dataset", "sha256") for run in side.runs} for side in evidence.sides)
    # Of a draw that both were evaluated on; runs on more images of one side alone tell nothing against it.
    passed = not any(lost.values()) and bool(ours & theirs)
    if passed:
        detail = f"Both models were evaluated on the same {n} images."
    elif not any(lost.values()):
        detail = f"The {n} images have the same names for both models, but other hashes: they may be other images."
    else:
        detail = f"{n} images were evaluated with both models; left out: "
        detail += ", ".join(f"{count} of {model} only" for model, count in lost.items() if count) + "."
    return Safeguard(name="same_images", passed=passed, detail=detail, withholds=BOTH)


def _distinct_images(evidence: Evidence) -> Safeguard:
    """Tests count images as independent: whoever gives each of them ten times makes any difference significant."""
    # Those on more images may have copies that are not among these.
    of_these = min(evidence.runs, key=lambda run: manifest_value(run, "dataset", "n"))
    n, copies = manifest_value(of_these, "dataset", "n"), int(of_these.manifest.get("copies") or 0)
    passed = copies <= COPIED_SHARE * n
    detail = f"{copies} of {n} images have the same contents as another one"
    detail += "." if passed else ": counted as images of their own, they make chance look like a difference; leave copies out."
    return Safeguard(name="distinct_images", passed=passed, detail=detail, withholds=BOTH)


def _one_network(evidence: Evidence) -> Safeguard:
    """Runs of one name may be of several trainings: each may fail where the other is strong."""
    sides = evidence.sides
    networks = [{tuple(manifest_value(run, "model").get(key) for key in NETWORK_KEYS) for run in side.runs} for side in sides]
    several = [side.name for side, of_side in zip(sides, networks, strict=True) if len(of_side) > 1]
    # Two factories of one file may be told apart by nothing but their names.
    names = [{manifest_value(run, "model", "name") for run in side.runs} for side in sides]
    shared = names[0] == names[1] and any(None not in network for network in networks[0] & networks[1])
    # What hashes do not cover, such as functions that a model's file imports, shows in what it predicts.
    changed = [side for side in sides if side.contradictions > CONTRADICTED_SHARE * len(side.images)]
    detail = "All runs of a model are of one network."
    if several:
        detail = (
            f"The runs of {' and of '.join(several)} are of different parameters or code, which no number here tells apart: "
            "name one network of each, as MODEL@ and eight digits of the state_sha256 in its manifest."
        )
    elif shared:
        detail = f"{sides[0].name} and {sides[1].name} are one network, with the same parameters and code."
    elif changed:
        counts = ", ".join(f"{side.contradictions} of {len(side.images)} images by {side.name}" for side in changed)
        detail = f"Runs of one model predict the same clean images differently ({counts}): models or images differ."
    return Safeguard(name="one_network", passed=not (several or shared or changed), detail=detail, withholds=BOTH)


def _same_training(evidence: Evidence) -> Safeguard:
    """A recipe alone can make any network more robust: adversarial training does."""
    sides = evidence.sides
    recipes = [
        {manifest_value(run, "training", "recipe") if run.manifest.get("training") else None for run in side.runs}
        for side in sides
    ]
    known = set.union(*recipes)
    if not evidence.claim.same_training:
        passed, detail = None, "The claim compares two models as they are, however they were trained: the recipes do not count."
    elif None in known:
        passed, detail = None, "Not all weights say by which recipe they were trained: whether by the same is not known."
    elif len(known) > 1 and _are_named_alike(known) and not all(map(_is_length_known, evidence.runs)):
        passed, detail = None, "Some runs name their recipe as older versions did: whether they mean the same is not known."
    elif len(known) > 1:
        ours, theirs = (", ".join(sorted(found)) for found in recipes)
        passed = False
        detail = (
            f"The two models were trained by different recipes ({ours}; {theirs}): these are compared, not the models; "
            "a claim that means to says `same_training: false`."
        )
    else:
        passed, detail = True, f"Both models were trained by the same recipe ({known.pop()}){_unequal_lengths(sides)}."
    return Safeguard(name="same_training", passed=passed, detail=detail, withholds=BOTH)


def _are_named_alike(recipes: set[str]) -> bool:
    return len({recipe.partition(" ")[0] for recipe in recipes}) == 1


def _is_length_known(run: Run) -> bool:
    # Older versions took it for a part of the recipe's identity.
    return "followed" in run.manifest["training"]


def _unequal_lengths(sides: Sequence[ModelOutcomes]) -> str:
    """Whoever learns faster may be stopped earlier, so that both are as accurate: `clean_accuracy` sees to that."""
    ours, theirs = (
        " or ".join(sorted({str(run.manifest["training"].get("followed") or "not said") for run in side.runs}))
        for side in sides
    )
    return "" if ours == theirs else f"; how far they followed it: {sides[0].name} {ours}; {sides[1].name} {theirs}"


def _same_configuration(evidence: Evidence) -> Safeguard:
    ours, theirs = (_configuration(side, evidence.claim.attacks) for side in evidence.sides)
    differing = sorted({key for key, _ in (ours - theirs) + (theirs - ours)})
    # What one size leaves standing another may break, and runs of both would count as one.
    mixed = sorted({key for side in (ours, theirs) for key in INPUT_KEYS if sum(name == key for name, _ in side) > 1})
    if mixed and not differing:
        detail = f"The runs of one model differ among themselves in {', '.join(mixed)}: report those alike by themselves."
    elif not differing:
        detail = "Both models were given images of one size and attacked with the same settings."
    else:
        detail = f"The evaluations of the two models differ in {', '.join(differing)}."
    return Safeguard(name="same_configuration", passed=not (differing or mixed), detail=detail, withholds=BOTH)


def _configuration(side: ModelOutcomes, attacks: tuple[str, ...] | None) -> Counter[tuple[str, str]]:
    """What must be alike; of attacks also how often each was made, as a repeated one is stronger."""
    found: Counter[tuple[str, str]] = Counter()
    for run in side.runs:
        for spec in manifest_value(run, "attacks"):
            if attacks is None or spec["name"] in attacks:
                found[f"attack {spec['name']}", json.dumps(spec, sort_keys=True)] += 1
        for key in INPUT_KEYS:
            found[key, repr(manifest_value(run, "model").get(key))] = 1
        settings: Mapping[str, Any] = run.manifest | {"chunk_size": run.manifest.get("plan", {}).get("chunk_size")}
        for key in ("seed", "chunk_size", "precision", "rows_version", "real_pixels"):
            found[key, repr(settings.get(key))] = 1
    return found


def _complete_runs(evidence: Evidence) -> Safeguard:
    unfinished = [run.folder.name for run in evidence.runs if not run.is_complete]
    detail = "All runs are complete."
    if unfinished:
        detail = f"Not complete: {', '.join(unfinished)}; the images finished so far are no random draw."
    return Safeguard(name="complete_runs", passed=not unfinished, detail=detail, withholds=BOTH)


def _clean_accuracy(evidence: Evidence) -> Safeguard:
    treatment, control = (is_correct.mean() for is_correct in evidence.is_clean_correct)
    limit = evidence.claim.largest_clean_difference
    passed = bool(abs(treatment - control) <= limit + 1e-12)
    detail = (
        f"Clean accuracy is {100 * treatment:.1f} % for {evidence.claim.treatment} and {100 * control:.1f} % for "
        f"{evidence.claim.control}: {100 * abs(treatment - control):.1f} points apart, {'within' if passed else 'more than'} "
        f"the {100 * limit:g} up to which they count as equally well trained (largest_clean_difference)."
    )
    return Safeguard(name="clean_accuracy", passed=passed, detail=detail, withholds=BOTH)


def _telling_eps(evidence: Evidence) -> Safeguard:
    """Where both models are at 0 % or at 100 %, none can be ahead: that says nothing of which is more robust."""
    matters = evidence.claim.smallest_difference
    shares = [
        [float((side[attack.is_finished] > eps).mean()) for side in (attack.treatment, attack.control)]
        for attack in evidence.decisive
        for eps in evidence.ladder(attack)
    ]
    telling = sum(max(pair) >= matters and min(pair) <= 1 - matters for pair in shares)
    detail = f"At {telling} of {len(shares)} budgets the models are neither broken nor robust on so nearly all images"
    detail += f" that a difference of {100 * matters:g} points is impossible."
    detail += "" if telling else " Take budgets in between."
    return Safeguard(name="telling_eps", passed=telling > 0, detail=detail, withholds=("refuted",))
