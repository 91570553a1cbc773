"""Do more steps, another start or a larger budget break what the run's attacks could not?"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from lrrobust.diagnostics.decision import is_tolerable
from lrrobust.diagnostics.own_attacks import PGD_STEPS, plain_pgd
from lrrobust.diagnostics.records import Diagnostic
from lrrobust.diagnostics.subject import Subject, parts
from lrrobust.report.formatting import format_eps
from lrrobust.threat import box_diameter

#: Steps at the budget where every image can be turned into plain grey: each moves a fortieth of the way.
LARGE_STEPS = 50


def check_convergence(subject: Subject) -> Iterator[Diagnostic]:
    """PGD from a new random start with twice the steps, on what survives the run's attacks of each norm, black-box ones too.

    It asks whether the worst case of the run would fall; whether gradients lead anywhere others ask.

    Source: Carlini et al., On Evaluating Adversarial Robustness, 2019, sections 4.4 and 4.5.
    """
    for norm in subject.norms:
        eps = norm.choose_eps()
        places = subject.survivors(norm, eps)
        steps = max([PGD_STEPS, *(2 * attack.spec.steps for attack in norm.climbers)])
        spec = plain_pgd(norm.norm, steps, name="convergence")
        broken = int(subject.strike(spec, eps, places).is_broken.sum()) if len(places) else 0
        passed = is_tolerable(broken, len(subject))
        # Its gradients may lead nowhere, and no attack of the run has shown that they do.
        is_alone = norm.by_gradient is None
        if passed and is_alone:
            passed = None
        detail = (
            f"At eps {format_eps(eps, norm.norm)} PGD in {norm.norm} from a new start with {steps} steps breaks {broken} of the "
            f"{len(places)} images (of {len(subject)}) that the attacks left standing"
        )
        if passed is False:
            why = "they see no gradients" if is_alone else "they had not converged"
            detail += f": {why}, and robust accuracy is lower than they say"
        elif is_alone:
            detail += ": none of these sees gradients, so whether those that PGD follows lead anywhere is not known"
        yield Diagnostic(name="convergence", passed=passed, detail=f"{detail}.", attack=norm.name, norm=norm.norm)


def check_large_eps(subject: Subject) -> Iterator[Diagnostic]:
    """The strongest attack of each norm at a budget that holds plain grey: linf 1/2, and its like in other norms.

    Every image can be turned into every other one's grey there, so no classifier is better than a constant.

    Source: Athalye et al., Obfuscated Gradients Give a False Sense of Security, 2018, section 3.1.
    """
    for norm in subject.norms:
        attack = norm.strongest
        is_own = attack in [outcomes.spec for outcomes in norm.attacks]
        eps = box_diameter(norm.norm, subject.images[0].numel()) / 2
        if hasattr(attack, "steps"):
            attack = attack.model_copy(update={"steps": max(attack.steps, LARGE_STEPS)})
            effort = f"{attack.steps} steps"
        else:
            effort = f"{attack.queries} queries"
        struck, withstanding = 0, 0
        # Every image that is left standing, and the sample, to which the attack may do less here than it did before.
        left = np.flatnonzero(norm.breaking_eps > eps)
        for chosen in parts(np.union1d(np.arange(len(subject)), left)):
            part = subject.on(chosen)
            struck += len(part)
            withstanding += int((~part.strike(attack, eps, np.arange(len(part))).is_broken).sum())
            # One is enough to know, and on those the attack takes all its steps.
            if withstanding:
                break
        passed = withstanding == 0
        detail = (
            f"At {norm.norm} eps {eps:.4g}, where every image can be turned into plain grey, {withstanding} of {struck} images "
            f"withstand {attack.name} with {effort}"
        )
        detail += "" if is_own else ", which stands in for attacks without a budget or of one step"
        if passed:
            detail += f"; the other {len(norm.breaking_eps) - struck} fell within the run's budgets." if struck < len(norm.breaking_eps) else "."
        else:
            detail += ": none can be robust there, so the attack fails on them."
        yield Diagnostic(
            name="large_eps", passed=passed, detail=detail, attack=attack.name if is_own else norm.name, norm=norm.norm
        )
