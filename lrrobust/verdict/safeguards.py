"""What evidence must pass before it may decide: were the two models treated alike, and did the attacks work?

A failed attack makes a model look robust. Doubts about one model's attacks therefore withhold the verdict that would
rest on its robustness, and no other: *supported* for the model the claim calls more robust, *refuted* for the other.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import bdtrc

from lrrobust.diagnostics.records import Diagnostic
from lrrobust.formatting import format_eps
from lrrobust.report.naming import WORST_CASE
from lrrobust.report.notices import warnings_of
from lrrobust.results import Run, manifest_value
from lrrobust.stats import binomial_p_value, discrete_bonferroni_level, mcnemar_p_value
from lrrobust.transfer_report import find_transfer
from lrrobust.verdict.evidence import AttackOutcomes, Evidence, ModelOutcomes, gather
from lrrobust.verdict.records import Claim, Safeguard, is_unbounded
from lrrobust.verdict.stronger_runs import find_checked_runs, find_stronger_run

Withheld = tuple[Literal["supported", "refuted"], ...]

_BOTH: Withheld = ("supported", "refuted")

#: Share of images for which only forbidden proposals may be made before an attack counts as failed.
REJECTED_SHARE = 0.01

#: Share of images that runs of one network may predict differently when clean, as other hardware makes them.
CONTRADICTED_SHARE = 0.01

#: Share of images that may be copies of others: too few to move a test.
COPIED_SHARE = 0.01

#: What of a model's manifest decides which images it sees, beside the data set.
_INPUT_KEYS = ("input_size", "resize_size", "interpolation", "num_classes", "classes_sha256")

#: What of it tells networks of one name apart.
_NETWORK_KEYS = ("state_sha256", "code_sha256")


def check_evidence(evidence: Evidence) -> tuple[Safeguard, ...]:
    """All safeguards, in the order of reading."""
    is_more = evidence.claim.direction == "more_robust"
    return (
        _same_images(evidence),
        _distinct_images(evidence),
        _one_network(evidence),
        _same_training(evidence),
        _same_configuration(evidence),
        _complete_runs(evidence),
        _clean_accuracy(evidence),
        _telling_eps(evidence),
        *_stronger_attacks(evidence),
        *_attacks_on_one_alone(evidence),
        *_of_model(evidence, evidence.treatment, is_claimed=is_more),
        *_of_model(evidence, evidence.control, is_claimed=not is_more),
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
    return Safeguard(name="same_images", passed=passed, detail=detail, withholds=_BOTH)


def _distinct_images(evidence: Evidence) -> Safeguard:
    """Tests count images as independent: whoever gives each of them ten times makes any difference significant."""
    # Those on more images may have copies that are not among these.
    of_these = min(evidence.runs, key=lambda run: manifest_value(run, "dataset", "n"))
    n, copies = manifest_value(of_these, "dataset", "n"), int(of_these.manifest.get("copies") or 0)
    passed = copies <= COPIED_SHARE * n
    detail = f"{copies} of {n} images have the same contents as another one"
    detail += "." if passed else ": counted as images of their own, they make chance look like a difference; leave copies out."
    return Safeguard(name="distinct_images", passed=passed, detail=detail, withholds=_BOTH)


def _one_network(evidence: Evidence) -> Safeguard:
    """Runs of one name may be of several trainings: each may fail where the other is strong."""
    sides = evidence.sides
    networks = [{tuple(manifest_value(run, "model").get(key) for key in _NETWORK_KEYS) for run in side.runs} for side in sides]
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
    return Safeguard(name="one_network", passed=not (several or shared or changed), detail=detail, withholds=_BOTH)


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
    return Safeguard(name="same_training", passed=passed, detail=detail, withholds=_BOTH)


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
    mixed = sorted({key for side in (ours, theirs) for key in _INPUT_KEYS if sum(name == key for name, _ in side) > 1})
    if mixed and not differing:
        detail = f"The runs of one model differ among themselves in {', '.join(mixed)}: report those alike by themselves."
    elif not differing:
        detail = "Both models were given images of one size and attacked with the same settings."
    else:
        detail = f"The evaluations of the two models differ in {', '.join(differing)}."
    return Safeguard(name="same_configuration", passed=not (differing or mixed), detail=detail, withholds=_BOTH)


def _configuration(side: ModelOutcomes, attacks: tuple[str, ...] | None) -> Counter[tuple[str, str]]:
    """What must be alike; of attacks also how often each was made, as a repeated one is stronger."""
    found: Counter[tuple[str, str]] = Counter()
    for run in side.runs:
        for spec in manifest_value(run, "attacks"):
            if attacks is None or spec["name"] in attacks:
                found[f"attack {spec['name']}", json.dumps(spec, sort_keys=True)] += 1
        for key in _INPUT_KEYS:
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
    return Safeguard(name="complete_runs", passed=not unfinished, detail=detail, withholds=_BOTH)


def _clean_accuracy(evidence: Evidence) -> Safeguard:
    treatment, control = (is_correct.mean() for is_correct in evidence.is_clean_correct)
    limit = evidence.claim.largest_clean_difference
    passed = bool(abs(treatment - control) <= limit + 1e-12)
    detail = (
        f"Clean accuracy is {100 * treatment:.1f} % for {evidence.claim.treatment} and {100 * control:.1f} % for "
        f"{evidence.claim.control}: {100 * abs(treatment - control):.1f} points apart, {'within' if passed else 'more than'} "
        f"the {100 * limit:g} up to which they count as equally well trained (largest_clean_difference)."
    )
    return Safeguard(name="clean_accuracy", passed=passed, detail=detail, withholds=_BOTH)


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


def _stronger_attacks(evidence: Evidence) -> Iterator[Safeguard]:
    """Attacks that do not judge here but were made: those a claim leaves out, or that were made on some images only.

    What they break besides may be as much of either model. A verdict that rests on the robustness of one cannot stand
    where they break more of that one, by what matters, and either by more than chance, as then those that judge failed
    on it, or by so much that less of its lead would be left than matters. Otherwise there is no reason to doubt: on the
    few images that a costly attack was made on, chance alone makes differences that matter. What it shows there, these
    images' own verdict says.
    """
    claim = evidence.claim
    favoured = _favoured(claim)
    judging = {(attack.name, attack.norm) for attack in evidence.attacks}
    for attack in evidence.decisive:
        for source in (evidence, *evidence.on_fewer):
            made = set.intersection(*({(each.name, each.norm) for each in side.attacks} for side in source.sides))
            of_norm = {key for key in made if key[1] == attack.norm}
            # One of a name that judges may be another there, such as of more steps.
            pairs = zip(source.sides, evidence.sides)
            again = set.intersection(*({made[:2] for made in _settings(of.runs) - _settings(own.runs)} for of, own in pairs))
            besides = sorted(name for name, _ in of_norm - judging | of_norm & again)
            # Where runs that judge are unfinished, these images may lack them: what others break besides is not known.
            if not besides or not of_norm & judging:
                continue
            _, ours, theirs = np.intersect1d(evidence.images, source.images, assume_unique=True, return_indices=True)
            own = [attack.treatment[ours], attack.control[ours]]
            of_all = [
                np.minimum.reduce([e.breaking_eps[side.shared] for e in side.attacks if (e.name, e.norm) in of_norm])[theirs]
                for side in source.sides
            ]
            finished = ~np.isnan(own[0] + own[1] + of_all[0] + of_all[1])
            n, ladder = int(finished.sum()), evidence.ladder(attack)
            if not n:
                continue
            newly = np.array([(o[finished] > eps) & (a[finished] <= eps) for o, a in zip(own, of_all) for eps in ladder])
            newly = newly.reshape(2, len(ladder), n)
            robust = [side[attack.is_finished] > np.array(ladder)[:, None] for side in (attack.treatment, attack.control)]
            lead = robust[0].mean(axis=1) - robust[1].mean(axis=1)
            excesses = {
                verdict: find_excess(
                    newly[side], newly[1 - side], lead if side == 0 else -lead, claim.smallest_difference, claim.significance
                )
                for verdict, side in favoured.items()
            }
            undermined = tuple(verdict for verdict, found in excesses.items() if found.undermines)
            uncertain = tuple(verdict for verdict, found in excesses.items() if found.matters and not undermined)
            found = max((excesses[verdict] for verdict in undermined or uncertain or excesses), key=lambda found: found.share)
            broken = newly[:, found.place].sum(axis=1)
            detail = (
                f"On {n} of these images {', '.join(besides)} {'was' if len(besides) == 1 else 'were'} made too, and at eps "
                f"{format_eps(ladder[found.place], attack.norm)} in {attack.norm} broke {broken[0]} more images of "
                f"{claim.treatment} and {broken[1]} more of {claim.control}"
            )
            if undermined:
                why = f"more of one than chance makes (one-sided p = {found.p_value:.2g})"
                if not found.is_beyond_chance:
                    why = f"which would leave {100 * found.left:.3g} points of a lead of {100 * found.lead:.3g}"
                detail += f", {why}: a verdict of {' or '.join(undermined)} would rest on their absence, so make it on all "
                detail += "of the images."
            elif uncertain:
                detail += ": a difference that matters, but on so few no more than chance makes "
                detail += f"(one-sided p = {found.p_value:.2g})."
            else:
                detail += ", where the two differ most: no difference that matters."
            yield Safeguard(
                name="stronger_attacks",
                passed=False if undermined else None if uncertain else True,
                detail=detail,
                withholds=undermined or uncertain or _BOTH,
                attack=besides[0] if len(besides) == 1 else None,
            )


def _favoured(claim: Claim) -> dict[Literal["supported", "refuted"], int]:
    """Whose robustness a verdict rests on: 0 is the treatment, 1 the control."""
    return {"supported": 0, "refuted": 1} if claim.direction == "more_robust" else {"supported": 1, "refuted": 0}


def _attacks_on_one_alone(evidence: Evidence) -> Iterator[Safeguard]:
    """Attacks that do not judge and that one model alone has met, on some images at least: what they would break of the other
    is not known.

    A verdict that rests on the robustness of that model cannot stand where, with what they break of it, less of its lead
    would be left than matters, by more than chance on some images. Of those that judge `same_configuration` sees to it.
    """
    claim = evidence.claim
    for attack in evidence.decisive:
        ladder = np.array(evidence.ladder(attack))[:, None]
        robust = [side[attack.is_finished] > ladder for side in (attack.treatment, attack.control)]
        for verdict, number in _favoured(claim).items():
            side = evidence.sides[number]
            found = list(_met_alone(evidence, number, attack.norm))
            if not found or not len(ladder):
                continue
            reached = np.fmin.reduce([breaking_eps for _, breaking_eps in found])[side.shared][attack.is_finished]
            standing = robust[number] & ~np.isnan(reached)
            fallen = (standing & (reached <= ladder)).sum(axis=1)
            share = robust[number].mean(axis=1)
            lead = share - robust[1 - number].mean(axis=1)
            taken = share * fallen / np.maximum(standing.sum(axis=1), 1)
            is_undermined = (lead >= claim.smallest_difference) & (lead - taken < claim.smallest_difference)
            n, by_chance = int((~np.isnan(reached)).sum()), np.zeros(len(ladder))
            if n < len(reached):
                # The share of those that stand, that may fall.
                may_fall = np.clip((lead - claim.smallest_difference) / np.maximum(share, 1e-12), 1e-12, 1 - 1e-12)
                counts = zip(fallen.tolist(), standing.sum(axis=1).tolist(), may_fall.tolist())
                by_chance = np.array([binomial_p_value(*of_eps) for of_eps in counts])
            is_certain = is_undermined & (by_chance <= claim.significance / len(ladder))
            shown = is_certain if is_certain.any() else is_undermined
            place = int(np.argmax(np.where(shown, lead, -1.0))) if shown.any() else int(taken.argmax())
            names = ", ".join(sorted({name for name, _ in found}))
            eps = format_eps(float(ladder[place, 0]), attack.norm)
            detail = (
                f"{side.name} alone has met {names}{'' if n == len(reached) else f' on {n} of these images'}, which would take "
                f"{100 * taken[place]:.3g} points of its robust accuracy at eps {eps} in {attack.norm}"
            )
            if is_undermined.any():
                detail += f", where it leads by {100 * lead[place]:.3g}: " + (
                    f"a verdict of {verdict} would rest on leaving them out, so make them on both models."
                    if is_certain.any()
                    else "on so few that may be chance."
                )
            else:
                detail += ": too little to matter to what it leads by."
            yield Safeguard(
                name="stronger_attacks",
                passed=False if is_certain.any() else None if is_undermined.any() else True,
                detail=detail,
                withholds=(verdict,),
                attack=names if len(found) == 1 else None,
            )


def _met_alone(evidence: Evidence, number: int, norm: str) -> Iterator[tuple[str, NDArray[np.float64]]]:
    """Attacks that do not judge and that one side alone has met, and what they broke of its images, NaN where not made."""
    side, other = evidence.sides[:: 1 if number == 0 else -1]
    ours, theirs = ([run for run in evidence.all_runs if _network(run) == _network(of.runs[0])] for of in (side, other))
    of_side = frozenset(side.images)
    met = [(_finished(gather([run], of_side)), _settings([run])) for run in theirs]
    for run in ours:
        judge = evidence.claim.attacks if run in side.runs else ()
        if judge is None:
            continue
        outcomes = gather([run], of_side)
        images = _finished(outcomes)
        known = {
            made for held, settings in met for made in settings if images.get(made[:2], set()) <= held.get(made[:2], set())
        }
        alone = {made[0] for made in _settings([run]) - known if made[0] not in judge}
        for each in outcomes.attacks:
            if each.norm == norm and each.name in alone:
                breaking_eps = np.full(len(side.images), np.nan)
                breaking_eps[np.searchsorted(side.images, outcomes.images)] = each.breaking_eps
                yield each.name, breaking_eps


def _finished(outcomes: ModelOutcomes) -> dict[tuple[str, str], set[str]]:
    """By name and norm of an attack the images that it was made on."""
    return {(each.name, each.norm): set(outcomes.images[~np.isnan(each.breaking_eps)]) for each in outcomes.attacks}


def _settings(runs: Sequence[Run]) -> set[tuple[str, str, str]]:
    """Name, norm and all settings of the attacks."""
    specs = (spec for run in runs for spec in manifest_value(run, "attacks"))
    return {(spec["name"], spec["norm"], json.dumps(spec, sort_keys=True)) for spec in specs}


def _network(run: Run) -> tuple[Any, ...]:
    """Which network a run is of, whatever its weights are called, and at which size it sees images."""
    return tuple(manifest_value(run, "model").get(key) for key in ("name", *_NETWORK_KEYS, *_INPUT_KEYS))


@dataclass(frozen=True)
class Excess:
    """How many more images of one model than of another attacks break besides, at the eps that tells most of it.

    Attributes:
        place: of that eps in the ladder.
        share: of the images.
        p_value: exact one-sided McNemar test against as many of either.
        matters: the share is as large as differences that matter, at some eps.
        is_beyond_chance: and at that eps larger than chance makes it, all eps tested together.
        lead, left: the largest lead of the one model, and what is left of those that matter by what was broken besides.
        undermines: a verdict that rests on the one model's robustness.
    """

    place: int
    share: float
    p_value: float
    matters: bool
    is_beyond_chance: bool
    lead: float
    left: float
    undermines: bool


def find_excess(
    of_one: NDArray[np.bool_],
    of_other: NDArray[np.bool_],
    lead: NDArray[np.float64],
    smallest_difference: float,
    significance: float,
) -> Excess:
    """What images broken besides take of one model's robustness.

    Args:
        of_one, of_other: (eps, n) images of either model broken besides.
        lead: (eps,) of the one model over the other under the attacks that judge, a fraction.
        smallest_difference: what matters, a fraction.
        significance: of the tests at all eps together.
    """
    b, c = (of_one & ~of_other).sum(axis=1), (of_other & ~of_one).sum(axis=1)
    share, p_values = (b - c) / of_one.shape[1], mcnemar_p_value(b, c, "greater")
    reached = smallest_difference - 1e-12
    matters = share >= reached
    beyond = matters & (p_values <= discrete_bonferroni_level(b + c, significance))
    # The largest share of those beyond chance, if any.
    place = int(np.argmax(np.where(beyond | ~beyond.any(), share, -np.inf)))
    # A verdict rests on the leads that matter; elsewhere chance makes others.
    largest, left = float(lead.max()), float((lead - share)[lead >= min(reached, lead.max())].max())
    takes_lead = bool(matters.any()) and largest >= reached > left
    return Excess(
        place, float(share[place]), float(p_values[place]), bool(matters.any()), bool(beyond.any()), largest, left,
        bool(beyond.any()) or takes_lead,
    )  # fmt: skip


def _of_model(evidence: Evidence, side: ModelOutcomes, is_claimed: bool) -> Iterator[Safeguard]:
    withholds: Withheld = ("supported",) if is_claimed else ("refuted",)
    judging = {(attack.name, attack.norm) for attack in evidence.attacks}
    attacks = [attack for attack in side.attacks if (attack.name, attack.norm) in judging]
    yield _better_than_chance(side, evidence.claim.significance, withholds)
    for attack in attacks:
        yield _monotone_curve(side.name, attack, evidence.claim.significance, withholds)
        yield _valid_proposals(side, attack, withholds)
    for norm in dict.fromkeys(attack.norm for attack in attacks):
        yield _unbounded_attack(evidence, side, norm, [attack for attack in attacks if attack.norm == norm], withholds)
    # What images of another model show on some of these images, they show of the model.
    on_fewer = [each.treatment if side is evidence.treatment else each.control for each in evidence.on_fewer]
    runs = {str(run.folder): run for each in (side, *on_fewer) for run in each.runs}
    yield from _transfer(side.name, list(runs.values()), evidence.transfer, withholds)
    for run, diagnostics in zip(side.runs, side.diagnostics):
        yield from _attack_diagnostics(evidence, side, run, diagnostics, withholds)


def _better_than_chance(side: ModelOutcomes, significance: float, withholds: Withheld) -> Safeguard:
    """Whoever always says the same cannot be made to say anything else, and is right as often as that is true.

    By chance, a model that says each class as often as this one would be right on the sum over classes of what share
    of images is of it times what share is said to be (Cohen, A coefficient of agreement for nominal scales, 1960).
    """
    labels, said = side.labels[side.shared], side.clean_predictions[side.shared]
    n, right = len(labels), int(side.is_clean_correct[side.shared].sum())
    chance = sum(float((labels == label).mean() * (said == label).mean()) for label in np.unique(labels))
    passed = chance < 1 and binomial_p_value(right, n, max(chance, 1e-12)) <= significance
    detail = (
        f"Clean, {side.name} is right on {right} of {n} images; by chance, with the same answers, it would be on "
        f"{chance * n:.1f}"
    )
    detail += "." if passed else ": it cannot be told from guessing, which no attack breaks."
    return Safeguard(name="better_than_chance", passed=passed, detail=detail, withholds=withholds)


def _monotone_curve(model: str, attack: AttackOutcomes, significance: float, withholds: Withheld) -> Safeguard:
    """Robust accuracy may not rise with eps by more than chance would make it.

    Each step of the ladder is a one-sided exact McNemar test, at the significance shared out between the steps.
    """
    broken, risen = attack.rises.T
    passed, detail = True, f"No image of {model} that {attack.name} broke at one eps withstood it at a larger one."
    if risen.any():
        p_values = np.where(risen > 0, bdtrc(np.maximum(risen - 1, 0), broken + risen, 0.5), 1.0)
        worst = int(np.argmin(p_values))
        passed = bool(p_values[worst] > significance / len(p_values))
        low, high = (format_eps(eps, attack.norm) for eps in attack.eps[worst : worst + 2])
        detail = (
            f"From eps {low} to {high}, {risen[worst]} images of {model} that {attack.name} had broken withstood it, and "
            f"{broken[worst]} were newly broken: " + ("no more than chance." if passed else "the curve rises.")
        )
    return Safeguard(name="monotone_curves", passed=passed, detail=detail, withholds=withholds, attack=attack.name)


def _valid_proposals(side: ModelOutcomes, attack: AttackOutcomes, withholds: Withheld) -> Safeguard:
    detail = (
        f"For {attack.rejected} of {len(side.images)} images of {side.name}, {attack.name} proposed nothing inside ball "
        "and box at some eps."
    )
    passed = attack.rejected <= REJECTED_SHARE * len(side.images)
    return Safeguard(name="valid_proposals", passed=passed, detail=detail, withholds=withholds, attack=attack.name)


def _unbounded_attack(
    evidence: Evidence, side: ModelOutcomes, norm: str, attacks: Sequence[AttackOutcomes], withholds: Withheld
) -> Safeguard:
    """Without a budget any image can be turned into any other: what survives then shows that the attack failed."""
    free = [attack for attack in attacks if is_unbounded(attack.eps[-1], norm)]
    if not free:
        name = WORST_CASE if len(attacks) > 1 else attacks[0].name
        checked = _checked_at_large_eps(evidence, side, norm, attacks)
        # Not knowing is no reason to believe: an attack that fails even without a budget looks like a robust model.
        passed = bool(checked) and all(found.passed for found in checked)
        detail = f"No {norm} row of {side.name} is without a budget"
        if passed:
            detail += f", but diagnostics tried one that holds plain grey: {checked[0].detail}"
        else:
            detail += ", nor do diagnostics say that an attack breaks all at one that holds plain grey: whether any attack "
            detail += "works is not known; run one that has no budget, such as cw, or eps 1/2, too."
    else:
        name = WORST_CASE if len(free) > 1 else free[0].name
        is_finished = ~np.isnan([attack.breaking_eps for attack in free]).any(axis=0)
        # What any attack has broken counts: a minimal-norm attack may find nothing on an image that falls at a finite eps.
        broken_at = np.fmin.reduce([attack.breaking_eps for attack in attacks])
        finished, survivors = int(is_finished.sum()), int(np.isinf(broken_at[is_finished]).sum())
        passed = survivors == 0
        detail = f"Without a budget, {survivors} of {finished} images of {side.name} withstand {name} in {norm}"
        detail += ": every image is broken, as it must be." if passed else ": the attack fails on them, as none can."
    return Safeguard(name="unbounded_attack", passed=passed, detail=detail, withholds=withholds, attack=name)


def _checked_at_large_eps(
    evidence: Evidence, side: ModelOutcomes, norm: str, attacks: Sequence[AttackOutcomes]
) -> list[Diagnostic]:
    """What diagnostics say of a budget that holds plain grey, in runs that made some of these attacks.

    There the strongest attack of the norm was made, or PGD in the place of those that take no budget or a single step. That
    an attack succeeds there whose rows are not judged says nothing of the judged ones. A failure that a stronger run answers
    is left out: that run's own success stands.
    """
    names = {attack.name for attack in attacks}
    checked = []
    for run, diagnostics in zip(side.runs, side.diagnostics):
        if names & {spec["name"] for spec in manifest_value(run, "attacks") if spec["norm"] == norm}:
            checked += [
                found
                for found in diagnostics or ()
                if found.name == "large_eps"
                and found.norm == norm
                and (found.attack is None or found.attack in names)
                and (found.passed is not False or find_stronger_run(evidence, side, run, found) is None)
            ]
    return checked


def _transfer(model: str, runs: Sequence[Run], transfer: Sequence[Run], withholds: Withheld) -> Iterator[Safeguard]:
    """Images made on another model may not break more than attacks that see the model's own gradient."""
    models = [manifest_value(run, "model") for run in runs]
    findings = find_transfer([*runs, *(run for run in transfer if manifest_value(run, "model") in models)])
    for finding in findings:
        yield Safeguard(name="transfer", passed=finding.passed, detail=finding.detail, withholds=withholds)
    if not findings:
        detail = f"No images made on another model were judged on {model}: whether they break more is not known."
        yield Safeguard(name="transfer", passed=None, detail=detail, withholds=withholds)


def _attack_diagnostics(
    evidence: Evidence, side: ModelOutcomes, run: Run, diagnostics: tuple[Diagnostic, ...] | None, withholds: Withheld
) -> Iterator[Safeguard]:
    """What the engine noticed while it attacked, and what was computed about the attacks."""
    name = "attack_diagnostics"
    for warning in warnings_of(run):
        yield Safeguard(name=name, passed=False, detail=f"{run.folder.name}: {warning}.", withholds=withholds)
    if diagnostics is None:
        # Not knowing is no reason to believe: an attack that failed looks like a model that is robust.
        checked = find_checked_runs(evidence, side, run)
        detail = f"{run.folder.name} carries no diagnostics by the rules of this version: whether its attacks worked on "
        detail += f"{side.name} was not looked into; "
        if checked:
            detail += f"it does not matter: {'; '.join(each.detail for each in checked)}."
        else:
            detail += "the same eval command, without --no-diagnostics, does so."
        answered_by = ", ".join(dict.fromkeys(each.run.folder.name for each in checked)) or None
        yield Safeguard(name=name, passed=bool(checked), detail=detail, withholds=withholds, answered_by=answered_by)
    for found in diagnostics or ():
        detail, passed, answered_by = f"{run.folder.name}, {found.name}: {found.detail}", found.passed, None
        if passed is False and (stronger := find_stronger_run(evidence, side, run, found)) is not None:
            passed, answered_by = True, stronger.run.folder.name
            detail += f" It no longer matters: {stronger.detail}."
        yield Safeguard(
            name=name, passed=passed, detail=detail, withholds=withholds, attack=found.attack, answered_by=answered_by
        )
