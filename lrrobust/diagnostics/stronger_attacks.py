"""Do more steps, another start or a larger budget break what the run's attacks could not?"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from lrrobust.diagnostics.decision import is_tolerable
from lrrobust.diagnostics.own_attacks import PGD_STEPS, new_starts
from lrrobust.diagnostics.records import Diagnostic
from lrrobust.diagnostics.subject import Subject, parts
from lrrobust.report.formatting import format_eps
from lrrobust.threat import box_diameter

#: Steps at the budget where every image can be turned into plain grey: each moves a fortieth of the way.
LARGE_STEPS = 50


#: Images of other classes than that of grey which it takes to say that an attack breaks all that can be.
FEWEST_OTHERS = 4


def check_convergence(subject: Subject) -> Iterator[Diagnostic]:
    """Attacks from new random starts with twice the steps, on what survives the run's attacks of each norm, black-box ones too.

    It asks whether the worst case of the run would fall; whether gradients lead anywhere others ask.

    Source: Carlini et al., On Evaluating Adversarial Robustness, 2019, sections 4.4 and 4.5.
    """
    for norm in subject.norms:
        eps = norm.choose_eps()
        places = subject.survivors(norm, eps)
        steps = max([PGD_STEPS, *(2 * attack.spec.steps for attack in norm.climbers)])
        left = places
        broken_by = []
        for spec in new_starts(norm.norm, steps, "convergence"):
            is_broken = subject.strike(spec, eps, left).is_broken if len(left) else np.zeros(0, dtype=bool)
            broken_by.append(int(is_broken.sum()))
            left = left[~is_broken]
        broken = sum(broken_by)
        passed = is_tolerable(broken, len(subject))
        # Its gradients may lead nowhere, and no attack of the run has shown that they do.
        is_alone = norm.by_gradient is None
        if passed and is_alone:
            passed = None
        detail = (
            f"At eps {format_eps(eps, norm.norm)} PGD in {norm.norm} from a new start with {steps} steps breaks {broken_by[0]} of the "
            f"{len(places)} images (of {len(subject)}) that the attacks left standing"
        )
        if len(broken_by) > 1:
            detail += f", and Auto-PGD on the DLR loss, which the scale of logits does not matter to, {broken_by[1]} more"
        if passed is False:
            # Enough by itself, whatever the other loss would have found.
            is_astray = is_tolerable(broken_by[0], len(subject)) is not False
            why = "they had not converged"
            if is_alone:
                why = "they see no gradients"
            elif is_astray:
                why = "the losses they climb lead elsewhere, as the cross-entropy of small logits does"
            detail += f": {why}, and robust accuracy is lower than they say"
        elif is_alone:
            detail += ": none of these sees gradients, so whether those that PGD follows lead anywhere is not known"
        yield Diagnostic(name="convergence", passed=passed, detail=f"{detail}.", attack=norm.name, norm=norm.norm)


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
        detail += "" if is_own else ", which stands in for attacks without a budget or of one step"
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
