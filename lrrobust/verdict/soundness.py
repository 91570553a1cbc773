"""Is the robustness of one model to be believed: did the attacks on it work?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from scipy.special import bdtrc

from lrrobust.diagnostics.records import Diagnostic
from lrrobust.formatting import format_eps
from lrrobust.report.naming import WORST_CASE
from lrrobust.report.notices import warnings_of
from lrrobust.results import Run, manifest_value
from lrrobust.stats import binomial_p_value
from lrrobust.transfer_report import find_transfer
from lrrobust.verdict.evidence import AttackOutcomes, Evidence, ModelOutcomes
from lrrobust.verdict.records import Safeguard, Withheld, is_unbounded
from lrrobust.verdict.stronger_runs import find_checked_runs, find_stronger_run

#: Share of images for which only forbidden proposals may be made before an attack counts as failed.
REJECTED_SHARE = 0.01


def check_model(evidence: Evidence, side: ModelOutcomes, is_claimed: bool) -> Iterator[Safeguard]:
    """Doubts about one model: they withhold the verdict that rests on its robustness.

    Args:
        is_claimed: whether it is the model that the claim calls more robust.
    """
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
