"""Do attacks that are weaker by construction break what the run's attacks could not?"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch

from lrrobust.diagnostics.decision import is_never_beaten, is_tolerable
from lrrobust.diagnostics.noise import inner_radius
from lrrobust.diagnostics.outcomes import NormOutcomes, Outcomes, is_multi_step, is_white_box
from lrrobust.diagnostics.own_attacks import single_step
from lrrobust.diagnostics.random_search import search_at_random
from lrrobust.diagnostics.records import Diagnostic
from lrrobust.diagnostics.subject import Subject
from lrrobust.report.formatting import format_eps
from lrrobust.threat import ThreatModel

#: Draws of noise for each image, half of either sort.
NOISE_DRAWS = 10

#: Images that the black-box attack passes through the model for each image it attacks: enough for it to break most
#: of those near the boundary, few enough to cost less than a run of PGD.
QUERIES = 100


def check_single_step(subject: Subject) -> Iterator[Diagnostic]:
    """A single gradient step against each attack of several, at the same budgets.

    From the rows, over all images, where the run has both; else one step is taken on the sample.

    Source: Athalye et al., Obfuscated Gradients Give a False Sense of Security, 2018, section 3.1.
    """
    for norm in subject.norms:
        single = [one for one in norm.attacks if is_white_box(one.spec) and getattr(one.spec, "steps", 1) == 1]
        for outcomes in norm.attacks:
            if not is_multi_step(outcomes.spec):
                continue
            if single:
                yield _against_rows(single[0], outcomes)
            else:
                yield _against_one_step(subject, norm, outcomes)


def _against_rows(single: Outcomes, several: Outcomes) -> Diagnostic:
    counts = []
    for level, eps in enumerate(several.eps):
        if eps in single.eps and 0 < eps < math.inf:
            here = single.eps.index(eps)
            known = several.is_attacked[level] & single.is_attacked[here]
            ours, theirs = several.is_broken[level][known], single.is_broken[here][known]
            counts.append((int((theirs & ~ours).sum()), int((ours & ~theirs).sum()), eps))
    name, attack = "single_step", several.spec.name
    if not counts:
        detail = f"{single.spec.name} and {attack} share no eps, so they cannot be compared."
        return Diagnostic(name=name, passed=None, detail=detail, attack=attack)
    passed = is_never_beaten([count[0] for count in counts], [count[1] for count in counts])
    theirs, ours, eps = max(counts, key=lambda count: count[0] - count[1])
    detail = (
        f"At eps {format_eps(eps, several.spec.norm)}, the budget most in its favour, the single step of {single.spec.name} "
        f"breaks {theirs} images that {attack} does not; {attack} breaks {ours} that it does not"
    )
    return Diagnostic(name=name, passed=passed, detail=detail + _if_beaten(passed), attack=attack)


def _against_one_step(subject: Subject, norm: NormOutcomes, several: Outcomes) -> Diagnostic:
    eps = norm.choose_eps()
    theirs = subject.strike(single_step(norm.norm), eps, np.arange(len(subject))).is_broken
    ours = several.breaking_eps[: len(subject)] <= eps
    passed = is_never_beaten([int((theirs & ~ours).sum())], [int((ours & ~theirs).sum())])
    detail = (
        f"At eps {format_eps(eps, norm.norm)} one gradient step breaks {(theirs & ~ours).sum()} of {len(subject)} images that "
        f"{several.spec.name} does not; {several.spec.name} breaks {(ours & ~theirs).sum()} that it does not"
    )
    return Diagnostic(name="single_step", passed=passed, detail=detail + _if_beaten(passed), attack=several.spec.name)


def _if_beaten(passed: bool) -> str:
    return "." if passed else ": more steps must not do worse, so the gradients along the way mislead it."


def check_random_noise(subject: Subject) -> Iterator[Diagnostic]:
    """Noise in the ball, drawn a few times, against the worst case of the run's attacks in each norm.

    Half of the draws are spread over the ball, half are corners of the cube that the ball holds.

    Source: Carlini et al., On Evaluating Adversarial Robustness, 2019, section 4.10 (brute force).
    """
    for norm in subject.norms:
        eps = norm.choose_eps()
        theirs = np.zeros(len(subject), dtype=bool)
        for draw in range(NOISE_DRAWS):
            proposed = subject.noisy(norm.norm, eps, draw, is_corner=draw % 2 == 1)
            verdict = subject.judge.judge(subject.images, subject.labels, proposed, ThreatModel(norm.norm, eps), subject.keys)
            theirs |= verdict.is_adversarial.cpu().numpy()
        ours = norm.breaking_eps[: len(subject)] <= eps
        noise_only = int((theirs & ~ours).sum())
        is_found_alone, is_noise_weak = is_tolerable(noise_only, len(subject)), is_tolerable(int(theirs.sum()), len(subject))
        passed = None if is_found_alone is None else bool(is_found_alone and (is_noise_weak or theirs.sum() < ours.sum()))
        detail = (
            f"At eps {format_eps(eps, norm.norm)} random noise of the same {norm.norm} size, drawn {NOISE_DRAWS} times, breaks "
            f"{theirs.sum()} of {len(subject)} images, {noise_only} of them images that the attacks do not; the attacks break {ours.sum()}"
        )
        detail += ": they find no more than chance does." if passed is False else "."
        yield Diagnostic(name="random_noise", passed=passed, detail=detail, attack=norm.name)


def check_black_box(subject: Subject) -> Iterator[Diagnostic]:
    """A small random search, which sees logits only, on what survives the run's attacks of each norm.

    Source: Athalye et al., Obfuscated Gradients Give a False Sense of Security, 2018, section 3.1.
    """
    for norm in subject.norms:
        eps = norm.choose_eps()
        places = subject.survivors(norm, eps)
        name, broken = "black_box", 0
        if len(places):
            radius = inner_radius(norm.norm, eps, subject.images[0].numel())
            proposed = search_at_random(subject, places, radius, QUERIES)
            at = torch.from_numpy(places).to(subject.labels.device)
            keys = [subject.keys[place] for place in places]
            verdict = subject.judge.judge(subject.images[at], subject.labels[at], proposed, ThreatModel(norm.norm, eps), keys)
            broken = int(verdict.is_adversarial.sum())
        passed = is_tolerable(broken, len(subject))
        detail = (
            f"At eps {format_eps(eps, norm.norm)} ({norm.norm}) a black-box search of {QUERIES} queries breaks {broken} of the "
            f"{len(places)} images (of {len(subject)}) that the attacks left standing"
        )
        detail += ": an attack without gradients must not beat those with them, so gradients are masked." if passed is False else "."
        yield Diagnostic(name=name, passed=passed, detail=detail, attack=norm.name)
