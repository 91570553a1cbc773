"""Failed and missing checks of a run that do not matter, as another run of the same model carries the verdict alone.

A failed check says that images stand which an attack could break. The verdict counts as broken what any run broke: where
one run carries it alone, with attacks that failed no check, another can only lower the robust accuracy further. So a failed
check of attacks in a norm is answered by a run on the same images, or more, that

- is complete, failed no check of this norm nor of the model, and passed this very check and `convergence` in it;
- made no attack of the norm that does not judge the claim;
- by its attacks that have all of the norm's budgets that judge breaks more of the images that the other had left standing,
  at a budget of both, than chance makes where a tolerable share stands wrongly, and nowhere leaves more than such a share
  standing of those that the other broke. So a check does not go away by making the same attack again until it passes.

Of a run without diagnostics nothing is known to have failed: there the other need not break more, all else is the same.

What is found out about a model, as that its logits are random, no attack answers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lrrobust.diagnostics.decision import is_tolerable
from lrrobust.diagnostics.records import Diagnostic
from lrrobust.formatting import format_eps
from lrrobust.report.notices import warnings_of
from lrrobust.results import Run, manifest_value
from lrrobust.verdict.evidence import AttackOutcomes, Evidence, ModelOutcomes, PairedAttack, gather

#: The check of the worst case of a norm; the others are of single attacks, or of attacks that see gradients.
_OF_WORST_CASE = "convergence"


@dataclass(frozen=True)
class StrongerRun:
    """A run that answers a failed or missing check of another, and by what.

    Attributes:
        run: the stronger one.
        detail: one sentence with the numbers.
    """

    run: Run
    detail: str


def find_stronger_run(evidence: Evidence, side: ModelOutcomes, weaker: Run, check: Diagnostic) -> StrongerRun | None:
    """The run of one side of a claim that answers a failed check of another one of it; None where there is none."""
    return _find(evidence, side, weaker, check.norm, {check.name, _OF_WORST_CASE}, must_find_more=True)


def find_checked_runs(evidence: Evidence, side: ModelOutcomes, unchecked: Run) -> list[StrongerRun]:
    """For each norm of a run without diagnostics one that answers for it; none where some norm has none."""
    norms = dict.fromkeys(spec["norm"] for spec in manifest_value(unchecked, "attacks"))
    found = [_find(evidence, side, unchecked, norm, {_OF_WORST_CASE}, must_find_more=False) for norm in norms]
    return [] if None in found else found


def _find(
    evidence: Evidence, side: ModelOutcomes, weaker: Run, norm: str | None, checks: set[str], must_find_more: bool
) -> StrongerRun | None:
    attack = next((attack for attack in evidence.decisive if attack.norm == norm), None)
    if attack is None or not evidence.ladder(attack):
        return None
    images = frozenset(evidence.images)
    outcomes = gather([weaker], images)
    of_weaker = [each for each in outcomes.attacks if each.norm == norm]
    if len(outcomes.images) < len(images) or not of_weaker:
        return None
    n = int(side.is_clean_correct[side.shared].sum())
    found = (
        _compare(evidence, attack, run, weaker, of_weaker, images, n, must_find_more)
        for run, diagnostics in zip(side.runs, side.diagnostics)
        if run is not weaker and run.is_complete and not warnings_of(run) and _is_sound(diagnostics, norm, checks)
    )
    return next((each for each in found if each is not None), None)


def _is_sound(diagnostics: tuple[Diagnostic, ...] | None, norm: str, checks: set[str]) -> bool:
    concerned = [found for found in diagnostics or () if found.norm in (None, norm)]
    passed = {found.name for found in concerned if found.passed and found.norm is not None}
    return not any(found.passed is False for found in concerned) and passed >= checks


def _compare(
    evidence: Evidence,
    attack: PairedAttack,
    run: Run,
    weaker: Run,
    of_weaker: list[AttackOutcomes],
    images: frozenset[str],
    n: int,
    must_find_more: bool,
) -> StrongerRun | None:
    norm, ladder = attack.norm, evidence.ladder(attack)
    outcomes = gather([run], images)
    judging = {each.name for each in evidence.attacks if each.norm == norm}
    if len(outcomes.images) < len(images) or not judging >= {
        spec["name"] for spec in manifest_value(run, "attacks") if spec["norm"] == norm
    }:
        return None
    of_run = [each for each in outcomes.attacks if each.norm == norm and all(_tells_of(each, eps) for eps in ladder)]
    if not of_run:
        return None
    theirs, ours = (np.minimum.reduce([each.breaking_eps for each in of_one]) for of_one in (of_weaker, of_run))
    more, fewer = (_only(*pair, ladder) for pair in ((ours, theirs), (theirs, ours)))
    if any(is_tolerable(count, n) is False for count in fewer.tolist()):
        return None
    if not must_find_more:
        return StrongerRun(
            run,
            f"{run.folder.name} passed its checks in {norm}, has all budgets there that judge, and leaves at most "
            f"{fewer.max()} of {n} images standing that {weaker.folder.name} broke",
        )
    # Where the other has no rows, that it broke fewer says nothing.
    more[[not any(_tells_of(each, eps) for each in of_weaker) for eps in ladder]] = 0
    if all(is_tolerable(count, n, looks=len(ladder)) is not False for count in more.tolist()):
        return None
    place = int(more.argmax())
    return StrongerRun(
        run,
        f"{run.folder.name} passed this check, and at eps {format_eps(ladder[place], norm)} in {norm} broke {more[place]} of "
        f"{n} images that {weaker.folder.name} had left standing, and {fewer[place]} fewer",
    )


def _tells_of(attack: AttackOutcomes, eps: float) -> bool:
    """Whether it has rows of that budget, or finds distances."""
    return eps in attack.eps or math.isinf(attack.eps[-1])


def _only(ours: NDArray[np.float64], theirs: NDArray[np.float64], ladder: tuple[float, ...]) -> NDArray[np.int64]:
    """Images broken by ours alone, at each budget."""
    budgets = np.array(ladder)[:, None]
    return ((ours <= budgets) & (theirs > budgets)).sum(axis=1)
