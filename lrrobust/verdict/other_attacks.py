"""Attacks that do not judge a claim but were made: would a verdict rest on leaving them out?"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lrrobust.formatting import format_eps
from lrrobust.results import Run, manifest_value
from lrrobust.stats import binomial_p_value, discrete_bonferroni_level, mcnemar_p_value
from lrrobust.verdict.evidence import INPUT_KEYS, NETWORK_KEYS, Evidence, ModelOutcomes, gather
from lrrobust.verdict.records import BOTH, Claim, Safeguard


def check_other_attacks(evidence: Evidence) -> Iterator[Safeguard]:
    """Those made on both models, and those made on one alone."""
    yield from _stronger_attacks(evidence)
    yield from _attacks_on_one_alone(evidence)


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
                withholds=undermined or uncertain or BOTH,
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
    return tuple(manifest_value(run, "model").get(key) for key in ("name", *NETWORK_KEYS, *INPUT_KEYS))


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
