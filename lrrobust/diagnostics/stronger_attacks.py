"""Do more steps, another start or a larger budget break what the run's attacks could not?"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from lrrobust.attacks.specs import PgdSpec
from lrrobust.diagnostics.decision import is_tolerable
from lrrobust.diagnostics.outcomes import Outcomes
from lrrobust.diagnostics.records import Diagnostic
from lrrobust.diagnostics.subject import Subject, has_pgd
from lrrobust.report.formatting import format_eps
from lrrobust.threat import box_diameter

#: Steps of the attack that repeats the run's with more effort: twice as many, within these bounds. PGD of 40 steps
#: that may cross the ball has converged on sound networks; beyond 200 steps an evaluation costs more than it says.
FEWEST_STEPS, MOST_STEPS = 40, 200

#: Steps at the budget where every image can be turned into plain grey: each moves a fortieth of the way.
LARGE_STEPS = 50


def check_convergence(subject: Subject) -> Iterator[Diagnostic]:
    """PGD from a new random start with twice the steps, on what survives the run's attacks of each norm.

    Source: Carlini et al., On Evaluating Adversarial Robustness, 2019, sections 4.4 and 4.5.
    """
    for norm in subject.norms:
        if not has_pgd(norm.norm):
            continue
        eps = norm.choose_eps()
        places = subject.survivors(norm, eps)
        steps = max((attack.spec.steps for attack in norm.climbers), default=1)
        steps = min(max(2 * steps, FEWEST_STEPS), MOST_STEPS)
        spec = PgdSpec(name="convergence", kind="pgd", norm=norm.norm, eps=(eps,), steps=steps)
        broken = int(subject.strike(spec, eps, places).is_broken.sum()) if len(places) else 0
        passed = is_tolerable(broken, len(subject))
        detail = (
            f"At eps {format_eps(eps, norm.norm)} another start of PGD in {norm.norm} with {steps} steps breaks {broken} of the "
            f"{len(places)} images (of {len(subject)}) that the attacks left standing"
        )
        late = [text for attack in norm.attacks if (text := late_breaks(attack, eps))]
        detail += "".join(f"; {text}" for text in late)
        detail += ": they had not converged, and robust accuracy is lower than they say." if passed is False else "."
        yield Diagnostic(name="convergence", passed=passed, detail=detail, attack=norm.name)


def late_breaks(outcomes: Outcomes, eps: float) -> str | None:
    """How many of an attack's breaks came in the last quarter of its steps, in words; None where rows do not say.

    An image leaves PGD with the step that breaks it, so the passes of a row say when that was.
    """
    spec = outcomes.spec
    if not isinstance(spec, PgdSpec) or spec.steps < 4 or eps not in outcomes.eps:
        return None
    level = outcomes.eps.index(eps)
    is_new = outcomes.is_broken[level] & outcomes.is_attacked[level] & (outcomes.backward_passes[level] > 0)
    if not is_new.any():
        return None
    # Steps of the start that broke the image, 1 to `steps`.
    step = (outcomes.backward_passes[level][is_new] - 1) % spec.steps + 1
    return f"{int((step > 0.75 * spec.steps).sum())} of {int(is_new.sum())} breaks of {spec.name} there came in the last quarter of its steps"


def check_large_eps(subject: Subject) -> Iterator[Diagnostic]:
    """The strongest attack of each norm at a budget that holds plain grey: linf 1/2, and its like in other norms.

    Every image can be turned into every other one's grey there, so no classifier is better than a constant.

    Source: Athalye et al., Obfuscated Gradients Give a False Sense of Security, 2018, section 3.1.
    """
    for norm in subject.norms:
        if norm.strongest is None:
            continue
        attack = norm.strongest.spec
        eps = box_diameter(norm.norm, subject.images[0].numel()) / 2
        spec = attack.model_copy(update={"steps": max(attack.steps, LARGE_STEPS)})
        survivors = int((~subject.strike(spec, eps, np.arange(len(subject))).is_broken).sum())
        passed = is_tolerable(survivors, len(subject))
        detail = (
            f"At {norm.norm} eps {eps:.4g}, where every image can be turned into plain grey, {survivors} of {len(subject)} "
            f"images withstand {attack.name} with {spec.steps} steps"
        )
        detail += ": none can be robust there, so the attack fails on them." if passed is False else "."
        yield Diagnostic(name="large_eps", passed=passed, detail=detail, attack=attack.name)

