"""Do attacks that are weaker by construction break what the run's attacks could not?"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from lrrobust.diagnostics.decision import is_never_beaten, is_tolerable
from lrrobust.diagnostics.noise import inner_radius
from lrrobust.diagnostics.outcomes import NormOutcomes, Outcomes, aims_at_one_class, is_black_box, is_multi_step
from lrrobust.diagnostics.own_attacks import plain_pgd, single_step
from lrrobust.diagnostics.random_search import search_at_random
from lrrobust.diagnostics.records import Diagnostic
from lrrobust.diagnostics.subject import Subject, parts
from lrrobust.formatting import format_eps
from lrrobust.threat import ThreatModel

#: Draws of noise for each image, half of either sort.
NOISE_DRAWS = 10

#: Images that the black-box attack passes through the model for each image it attacks: enough for it to break most
#: of those near the boundary, few enough to cost less than a run of PGD.
QUERIES = 100


def check_single_step(subject: Subject) -> Iterator[Diagnostic]:
    """A single gradient step against each attack of several, at the same budgets.

    From the rows, over all images, where the run let both at all of them; else one step is taken on the sample.

    Source: Athalye et al., Obfuscated Gradients Give a False Sense of Security, 2018, section 3.1.
    """
    for norm in subject.norms:
        single = [one for one in norm.attacks if one.spec.needs_gradient and getattr(one.spec, "steps", 1) == 1]
        for outcomes in norm.attacks:
            if not is_multi_step(outcomes.spec) or not outcomes.has_budget:
                continue
            by_rows = (_against_rows(one, outcomes) for one in single)
            found = next((found for found in by_rows if found is not None), None)
            yield _against_one_step(subject, norm, outcomes) if found is None else found


def _against_rows(single: Outcomes, several: Outcomes) -> Diagnostic | None:
    counts = []
    for level, eps in enumerate(single.eps):
        ours = several.breaking_eps <= eps
        # What one of them broke and the other was not let at would count for the one alone.
        are_both_let = single.is_attacked[level].all() and (ours | several.has_tried(eps)).all()
        if 0 < eps < math.inf and several.eps[-1] >= eps and are_both_let:
            known = ours | several.withstood(eps)
            theirs = single.is_broken[level] & known
            counts.append((int((theirs & ~ours).sum()), int((ours & known & ~theirs).sum()), eps))
    if not counts:
        return None
    attack = several.spec.name
    passed = is_never_beaten([count[0] for count in counts], [count[1] for count in counts])
    theirs, ours, eps = max(counts, key=lambda count: count[0] - count[1])
    detail = (
        f"At eps {format_eps(eps, several.spec.norm)}, the budget most in its favour, the single step of {single.spec.name} "
        f"breaks {theirs} images that {attack} does not; {attack} breaks {ours} that it does not"
    )
    return _beside_one_step(several, passed, detail)


def _against_one_step(subject: Subject, norm: NormOutcomes, several: Outcomes) -> Diagnostic:
    # One of its own: of the others' it may have no row.
    eps = NormOutcomes(norm.norm, (several,)).choose_eps()
    theirs = subject.strike(single_step(norm.norm), eps, np.arange(len(subject))).is_broken
    ours = several.breaking_eps[: len(subject)] <= eps
    # What an earlier attack of the suite had broken was not left to it.
    withheld = np.flatnonzero(~ours & ~several.has_tried(eps)[: len(subject)])
    if len(withheld):
        ours[withheld] = subject.strike(several.spec, eps, withheld).is_broken
    passed = is_never_beaten([int((theirs & ~ours).sum())], [int((ours & ~theirs).sum())])
    detail = (
        f"At eps {format_eps(eps, norm.norm)} one gradient step breaks {(theirs & ~ours).sum()} of {len(subject)} images that "
        f"{several.spec.name} does not; {several.spec.name} breaks {(ours & ~theirs).sum()} that it does not"
    )
    return _beside_one_step(several, passed, detail)


def _beside_one_step(several: Outcomes, is_ahead: bool, detail: str) -> Diagnostic:
    spec, passed = several.spec, is_ahead
    if not is_ahead and aims_at_one_class(spec):
        passed = None
    if passed:
        detail += "."
    elif passed is None:
        detail += f". {spec.name} aims at one class, which may be far: one step towards the nearest may well break more."
    else:
        detail += ": more steps must not do worse, so the gradients along the way mislead it."
    return Diagnostic(name="single_step", passed=passed, detail=detail, attack=spec.name, norm=spec.norm)


def check_random_noise(subject: Subject) -> Iterator[Diagnostic]:
    """Noise in the ball, drawn a few times, against the attacks by gradient in each norm; against all where none is one.

    Half of the draws are spread over the ball, half are corners of the cube that the ball holds.

    Source: Carlini et al., On Evaluating Adversarial Robustness, 2019, section 4.10 (brute force).
    """
    for norm in subject.norms:
        attacks = norm.by_gradient or norm
        eps = attacks.choose_eps(len(subject))
        theirs = np.zeros(len(subject), dtype=bool)
        for draw in range(NOISE_DRAWS):
            proposed = subject.noisy(norm.norm, eps, draw, is_corner=draw % 2 == 1)
            verdict = subject.judge.judge(subject.images, subject.labels, proposed, ThreatModel(norm.norm, eps), subject.keys)
            theirs |= verdict.is_adversarial.cpu().numpy()
        ours, left = attacks.broke(eps)[: len(subject)], attacks.left_standing(eps)[: len(subject)]
        n, broken, noise_only = int((ours | left).sum()), int((theirs & (ours | left)).sum()), int((theirs & left).sum())
        is_found_alone, is_noise_weak = is_tolerable(noise_only, n), is_tolerable(broken, n)
        # Where nothing is left standing nothing can be missed, however well noise does.
        is_better = bool(is_noise_weak) or broken < ours.sum() or not left.any()
        passed = None if is_found_alone is None else bool(is_found_alone and is_better)
        detail = (
            f"At eps {format_eps(eps, norm.norm)} random noise of the same {norm.norm} size, drawn {NOISE_DRAWS} times, breaks "
            f"{broken} of {n} images, {noise_only} of them images that {_meant(norm)} do not; these "
            f"break {ours.sum()}"
        )
        detail += ": they find no more than chance does." if passed is False else "."
        yield Diagnostic(name="random_noise", passed=passed, detail=detail, attack=norm.name, norm=norm.norm)


def check_black_box(subject: Subject) -> Iterator[Diagnostic]:
    """Attacks that see logits only against those by gradient, in each norm.

    A small random search on the images of the sample that the attacks by gradient left standing, and, from the rows, what
    the run's own black-box attacks break of all such images.

    Source: Athalye et al., Obfuscated Gradients Give a False Sense of Security, 2018, section 3.1.
    """
    for norm in subject.norms:
        own = tuple(attack for attack in norm.attacks if attack.spec.kind == "custom")
        compared = norm.by_gradient or (replace(norm, attacks=own) if own else None)
        if compared is None:
            detail = "None of the attacks is one by gradients, so there is nothing that a black-box search must not beat."
            yield Diagnostic(name="black_box", passed=None, detail=detail, attack=norm.name, norm=norm.norm)
            continue
        yield _search(subject, norm, compared)
        # One step of a gradient may well be beaten by thousands of queries.
        if any(is_multi_step(attack.spec) for attack in compared.attacks):
            for attack in norm.attacks:
                if is_black_box(attack.spec):
                    yield _rows_of_black_box(subject, attack, compared)


def _search(subject: Subject, norm: NormOutcomes, by_gradient: NormOutcomes) -> Diagnostic:
    eps = by_gradient.choose_eps(len(subject))
    left = by_gradient.left_standing(eps)[: len(subject)]
    n, places = int((left | by_gradient.broke(eps)[: len(subject)]).sum()), np.flatnonzero(left)
    broken = 0
    if len(places):
        radius = inner_radius(norm.norm, eps, subject.images[0].numel())
        proposed = search_at_random(subject, places, radius, QUERIES)
        at = torch.from_numpy(places).to(subject.labels.device)
        keys = [subject.keys[place] for place in places]
        verdict = subject.judge.judge(subject.images[at], subject.labels[at], proposed, ThreatModel(norm.norm, eps), keys)
        broken = int(verdict.is_adversarial.sum())
    passed = is_tolerable(broken, n)
    detail = (
        f"At eps {format_eps(eps, norm.norm)} ({norm.norm}) a black-box search of {QUERIES} queries breaks {broken} of the "
        f"{len(places)} images (of {n}) that {_meant(norm)} left standing{_if_masked(passed)}"
    )
    return Diagnostic(name="black_box", passed=passed, detail=detail, attack=norm.name, norm=norm.norm)


@dataclass
class _Level:
    """What a black-box attack broke at one budget: `only` were left standing by attacks by gradient, of `n` these tell of.

    `withheld` are the places of images that it broke, and that not all attacks by gradient were let at.
    """

    eps: float
    only: int
    n: int
    withheld: NDArray[np.int64]
    looked_at: int = 0

    def look(self, subject: Subject, by_gradient: NormOutcomes, looks: int) -> None:
        """Lets attacks by gradient at what was withheld, until it can no longer matter what the rest shows."""
        for chosen in parts(self.withheld):
            rest = len(self.withheld) - self.looked_at
            is_settled = is_tolerable(self.only + rest, self.n + rest, looks=looks)
            if is_settled or is_tolerable(self.only, self.n + rest, looks=looks) is False:
                return
            part = subject.on(chosen)
            is_left = np.ones(len(part), dtype=bool)
            for spec in dict.fromkeys((by_gradient.strongest, plain_pgd(by_gradient.norm))):
                if is_left.any():
                    is_left[is_left] = ~part.strike(spec, self.eps, np.flatnonzero(is_left)).is_broken
            self.only += int(is_left.sum())
            self.n += len(part)
            self.looked_at += len(part)


def _rows_of_black_box(subject: Subject, attack: Outcomes, by_gradient: NormOutcomes) -> Diagnostic:
    """Where a black-box attack came first, those by gradient may not have had their turn: they have it now."""
    levels = []
    for level, eps in enumerate(attack.eps):
        if 0 < eps < math.inf and by_gradient.reaches(eps):
            is_own = attack.is_broken[level] & attack.is_attacked[level]
            left, broke = by_gradient.left_standing(eps), by_gradient.broke(eps)
            withheld = np.flatnonzero(is_own & ~left & ~broke)
            levels.append(_Level(eps, int((is_own & left).sum()), int((left | broke).sum()), withheld))
    name, norm = attack.spec.name, attack.spec.norm
    if not levels:
        detail = f"No attack by gradient has a budget as large as {name}'s, so they cannot be compared."
        return Diagnostic(name="black_box", passed=None, detail=detail, attack=name, norm=norm)
    results = {}
    # Those that tell most without a new attack first: one that fails is enough.
    for at in sorted(levels, key=lambda at: -at.only / max(at.n, 1)):
        at.look(subject, by_gradient, len(levels))
        results[at.eps] = is_tolerable(at.only, at.n, looks=len(levels))
        if results[at.eps] is False:
            break
    else:
        at = max(levels, key=lambda at: at.only / max(at.n, 1))
    passed = results[at.eps]
    detail = (
        f"At eps {format_eps(at.eps, norm)}, where most are found, {name} breaks {at.only} of {at.n} images that the attacks "
        "by gradient left standing"
    )
    if at.looked_at:
        detail += f", the strongest of them and plain PGD on {at.looked_at} images that not all of these were let at"
    return Diagnostic(name="black_box", passed=passed, detail=detail + _if_masked(passed), attack=name, norm=norm)


def _meant(norm: NormOutcomes) -> str:
    """Which of a norm's attacks are compared with weaker ones."""
    kinds = {attack.spec.needs_gradient for attack in norm.attacks}
    return "the attacks by gradient" if len(kinds) > 1 else "the attacks"


def _if_masked(passed: bool | None) -> str:
    if passed is False:
        return (
            ": an attack without gradients must not beat those with them, so gradients are masked, or those attacks are weak."
        )
    return "."
