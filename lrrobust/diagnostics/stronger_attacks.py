"""Do more steps, another start or a larger budget break what the run's attacks could not?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from lrrobust.diagnostics.decision import TOLERATED_SHARE, is_tolerable
from lrrobust.diagnostics.outcomes import NormOutcomes, is_black_box
from lrrobust.diagnostics.own_attacks import PGD_STEPS, NewStart, new_starts
from lrrobust.diagnostics.records import Diagnostic
from lrrobust.diagnostics.subject import Subject, parts
from lrrobust.formatting import format_eps
from lrrobust.threat import box_diameter

#: Steps at the budget where every image can be turned into plain grey: each moves a fortieth of the way.
LARGE_STEPS = 50

#: Images left standing that new attacks are made on, at most, and how many of them at a time beyond the sample. Where a tenth
#: of all images stands wrongly beside half of them, so many show it eight times in ten, those of a sample of 24 once in five.
MOST_SURVIVORS, SURVIVORS_AT_ONCE = 64, 24

#: Images of other classes than that of grey which it takes to say that an attack breaks all that can be.
FEWEST_OTHERS = 4

_NO_GRADIENT = "The model's logits carry no gradient, so whether attacks that follow one would break more is not known."


@dataclass
class _Level:
    """What new attacks break at one budget of the images that those of the run left standing.

    Attributes:
        broken: by each of the new attacks, one after the other.
        struck, n: how many were left standing, of how many images.
        looks: how many counts like this one decide together; see `is_tolerable`.
    """

    eps: float
    broken: NDArray[np.int64]
    looks: int
    struck: int = 0
    n: int = 0

    @property
    def passed(self) -> bool | None:
        return is_tolerable(int(self.broken.sum()), self.n, looks=self.looks)

    @property
    def decisive(self) -> int:
        """Place of the attack with which the check fails: enough by itself, whatever the next would have found."""
        passed = [is_tolerable(int(count), self.n, looks=self.looks) for count in self.broken.cumsum()]
        return passed.index(False)


def check_convergence(subject: Subject) -> Iterator[Diagnostic]:
    """New attacks, with twice the steps, on what survives the run's attacks of each norm, black-box ones too.

    It asks whether the worst case of the run would fall; whether gradients lead anywhere others ask. At the budget where about
    half of the images are broken, and at the largest that leaves enough standing. The sample's survivors come first; where more
    of them break than is tolerated, but not yet more than chance makes, others of the run follow, up to `MOST_SURVIVORS`. An
    image takes at most 2 * steps + `TARGETS` * `TARGETED_STEPS` passes. Where the run's attacks average over passes of a
    randomised model, these do over twice as many.

    Source: Carlini et al., On Evaluating Adversarial Robustness, 2019, sections 4.4 and 4.5.
    """
    for norm in subject.norms:
        if norm.by_gradient is None and not subject.has_gradient():
            yield Diagnostic(name="convergence", passed=None, detail=_NO_GRADIENT, attack=norm.name, norm=norm.norm)
            continue
        steps = max([PGD_STEPS, *(2 * attack.spec.steps for attack in norm.climbers)])
        attacks = new_starts(norm.norm, steps, "convergence")
        budgets = _struck_budgets(norm)
        levels: list[_Level] = []
        for eps in budgets:
            levels.append(_strike_survivors(subject, norm, eps, attacks, len(budgets)))
            if levels[-1].passed is False:
                break
        failed = next((level for level in levels if level.passed is False), None)
        level = failed or levels[0]
        passed = level.passed
        # Its gradients may lead nowhere, and no attack of the run has shown that they do.
        is_alone = norm.by_gradient is None
        if passed and is_alone:
            passed = None
        detail = (
            f"At eps {format_eps(level.eps, norm.norm)} {attacks[0].what} breaks {level.broken[0]} of the {level.struck} "
            f"images (of {level.n}) that the attacks left standing"
        )
        rest = [
            f"{attack.what} {count} more"
            for attack, count in zip(attacks[1:], level.broken[1:], strict=True)
            if _is_made(attack, subject)
        ]
        detail += "".join(f", {each}" for each in rest[:-1]) + f", and {rest[-1]}"
        if passed is False:
            is_black = all(is_black_box(attack.spec) for attack in norm.attacks)
            why = "they see no gradients" if is_black else attacks[level.decisive].why
            detail += f": {why}, and robust accuracy is lower than they say"
        else:
            for other in levels[1:]:
                detail += (
                    f"; at eps {format_eps(other.eps, norm.norm)}, the largest that leaves enough to look at, they break "
                    f"{other.broken.sum()} of {other.struck} (of {other.n})"
                )
            if passed and any(other.broken.any() for other in levels):
                detail += f"; too few to show that more than {100 * TOLERATED_SHARE:g} % of images stand wrongly"
            if is_alone:
                detail += ": none of these is one by gradients, so whether those that PGD follows lead anywhere is not known"
        yield Diagnostic(name="convergence", passed=passed, detail=f"{detail}.", attack=norm.name, norm=norm.norm)


def _struck_budgets(norm: NormOutcomes) -> list[float]:
    """Where about half is broken, and the largest at which so much stands that breaking it all would matter."""
    near, n = norm.choose_eps(), len(norm.breaking_eps)
    far = [eps for eps in norm.budgets if eps > near and is_tolerable(int((~norm.broke(eps)).sum()), n) is False]
    return [near, *far[-1:]]


def _is_made(attack: NewStart, subject: Subject) -> bool:
    """Whether there is another class to lead to."""
    return not attack.is_narrowed or len(subject.predicted) > 1


def _strike_survivors(subject: Subject, norm: NormOutcomes, eps: float, attacks: Sequence[NewStart], budgets: int) -> _Level:
    standing = np.flatnonzero(~norm.broke(eps))
    in_sample = int((standing < len(subject)).sum())
    done, end = 0, in_sample
    most = max(end, min(len(standing), MOST_SURVIVORS))
    level = _Level(eps, np.zeros(len(attacks), dtype=np.int64), looks=budgets * (1 + -(-(most - end) // SURVIVORS_AT_ONCE)))
    level.n = len(subject)
    while True:
        if end == in_sample:
            part, left = subject, standing[:end]
        else:
            part, left = subject.on(standing[done:end].tolist()), np.arange(end - done)
        for place, attack in enumerate(attacks):
            if not len(left) or not _is_made(attack, subject):
                continue
            spec = attack.spec
            if subject.eot_iter > 1:
                spec = spec.model_copy(update={"eot_iter": 2 * subject.eot_iter})
            is_broken = part.strike(spec, eps, left, subject.predicted if attack.is_narrowed else None).is_broken
            level.broken[place] += is_broken.sum()
            left = left[~is_broken]
        level.struck = end
        if end >= most or level.broken.sum() <= TOLERATED_SHARE * level.n or level.passed is False:
            return level
        done, end = end, min(end + SURVIVORS_AT_ONCE, most)
        # All images up to the last that was struck.
        level.n = len(norm.breaking_eps) if end == len(standing) else int(standing[end - 1]) + 1


def check_large_eps(subject: Subject) -> Iterator[Diagnostic]:
    """The strongest attack of each norm at a budget that holds plain grey: linf 1/2, and its like in other norms.

    Every image can be turned into every other one's grey there, so an image of another class than that of grey cannot be
    robust. One of grey's own class can be, if no point of the ball is any other class: those that withstand say nothing.

    Source: Athalye et al., Obfuscated Gradients Give a False Sense of Security, 2018, section 3.1.
    """
    plain = torch.full_like(subject.images[:1], 0.5)
    grey = subject.judge.predict(plain, subject.labels[:1], ["plain grey"]).label
    for norm in subject.norms:
        attack = norm.strongest
        is_own = attack in [outcomes.spec for outcomes in norm.attacks]
        if attack.needs_gradient and norm.by_gradient is None and not subject.has_gradient():
            yield Diagnostic(name="large_eps", passed=None, detail=_NO_GRADIENT, attack=norm.name, norm=norm.norm)
            continue
        eps = box_diameter(norm.norm, subject.images[0].numel()) / 2
        if hasattr(attack, "steps"):
            attack = attack.model_copy(update={"steps": max(attack.steps, LARGE_STEPS)})
            effort = f"{attack.steps} steps"
        else:
            effort = f"{attack.queries} queries"
        struck, withstanding, of_grey = 0, 0, 0
        # Every image that is left standing, and the sample, to which the attack may do less here than it did before.
        left = np.flatnonzero(norm.breaking_eps > eps)
        looked_at = np.union1d(np.arange(len(subject)), left)
        for chosen in parts(looked_at):
            part = subject.on(chosen)
            is_of_grey = (part.labels == grey).cpu().numpy()
            # Beyond the sample those say nothing, and would be attacked to the last step.
            tried = np.flatnonzero(~is_of_grey | (np.array(chosen) < len(subject)))
            struck += len(tried)
            if not len(tried):
                continue
            stands, is_of_grey = ~part.strike(attack, eps, tried).is_broken, is_of_grey[tried]
            withstanding += int((stands & ~is_of_grey).sum())
            of_grey += int((stands & is_of_grey).sum())
            # One is enough to know, and on those the attack takes all its steps.
            if withstanding:
                break
        passed: bool | None = withstanding == 0
        # Hardly an image fell of which it is known that it must.
        if passed and of_grey and int((subject.labels != grey).sum()) < FEWEST_OTHERS:
            passed = None
        detail = (
            f"At {norm.norm} eps {eps:.4g}, where every image can be turned into plain grey, {withstanding} of {struck} images "
            f"withstand {attack.name} with {effort}"
        )
        detail += f", and {of_grey} that are of the class of grey and may be robust" if of_grey else ""
        detail += "" if is_own else ", which stands in for attacks without a budget, of one step, or of one's own"
        if passed is None:
            detail += ": hardly one is of another class, so whether the attack fails is not known."
        elif passed:
            fell = len(norm.breaking_eps) - len(looked_at)
            detail += f"; the other {fell} fell within the run's budgets." if fell else "."
        else:
            detail += ": none can be robust there, so the attack fails on them."
        yield Diagnostic(
            name="large_eps", passed=passed, detail=detail, attack=attack.name if is_own else norm.name, norm=norm.norm
        )
