"""Were images still breaking when an attack came to its end?"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from lrrobust.diagnostics.decision import SIGNIFICANCE
from lrrobust.diagnostics.outcomes import Outcomes, is_climber
from lrrobust.diagnostics.records import Diagnostic
from lrrobust.diagnostics.subject import Subject
from lrrobust.formatting import format_eps
from lrrobust.stats import binomial_p_value

#: Share of its steps after which a break is late.
LATE = 0.75

#: Share of images that a converged attack may break late: 5 points of robust accuracy at one budget. PGD of 20 steps
#: breaks 0 to 3 % of the images late at each budget of its ladder, on the trained networks and on a linear one.
TOLERATED_LATE = 0.05

#: Fewer steps have no last quarter that rows can tell: they do not say whether it was the last step that broke an image,
#: or the one before.
FEWEST_STEPS = 5

#: All steps together, in units of eps, must be as long: three quarters of them then cross the ball, nearly, from wherever
#: the start was. Where they are shorter the last ones come to where none could be before, and break what lies there,
#: however well the attack has converged: MI-FGSM as published breaks 11 to 18 % late on linear models.
LEAST_REACH = 2.5


def check_late_breaks(subject: Subject) -> Iterator[Diagnostic]:
    """One result for each attack that climbs at a budget, at the budget where it looks worst, over all images.

    From the rows: an image is attacked no more once it is broken, so its passes say by which step that was. What many
    images need the last steps for, more would have needed steps that were not made.

    Source: Carlini et al., On Evaluating Adversarial Robustness, 2019, section 4.4.
    """
    for outcomes in subject.outcomes:
        if is_climber(outcomes.spec) and any(eps > 0 for eps in outcomes.eps):
            passed, detail = _look(outcomes)
            yield Diagnostic(
                name="late_breaks", passed=passed, detail=detail, attack=outcomes.spec.name, norm=outcomes.spec.norm
            )


def _look(outcomes: Outcomes) -> tuple[bool | None, str]:
    spec = outcomes.spec
    # One search leads to one target, or by one kind of gradient; the next need not find what it left to find.
    steps = spec.steps * getattr(spec, "restarts", 1)
    if steps < FEWEST_STEPS:
        return None, f"Rows do not tell which of its {steps} steps broke an image: {spec.name} needs {FEWEST_STEPS} at least."
    if (reach := getattr(spec, "step_size_ratio", LEAST_REACH)) < LEAST_REACH:
        detail = (
            f"All steps of {spec.name} together are {reach:g} eps long: its last ones come to where no other could, so that "
            "they break images says nothing of convergence."
        )
        return None, detail
    # At the smallest budget that breaks an image: on a GPU larger ones are attacked beside it, and their passes tell
    # of nothing.
    is_broken_before = np.zeros_like(outcomes.is_broken)
    is_broken_before[1:] = np.logical_or.accumulate(outcomes.is_broken)[:-1]
    is_new = outcomes.is_broken & outcomes.is_attacked & ~is_broken_before
    if np.isnan(outcomes.backward_passes[is_new]).any():
        return None, f"The steps of {spec.name} were not counted, so when it broke an image is not known."
    # The step that was made before the break, from 0; none where the start was adversarial by itself.
    step = (outcomes.backward_passes / spec.eot_iter - 1) % steps
    is_late = is_new & (outcomes.backward_passes > 0) & (step > LATE * steps)
    n = is_new.shape[1]
    counts = is_late.sum(1)
    worst = int(counts.argmax())
    p_value = binomial_p_value(int(counts[worst]), n, TOLERATED_LATE) * sum(eps > 0 for eps in outcomes.eps)
    passed = p_value > SIGNIFICANCE
    seen = f"{counts[worst]} of {n} images at eps {format_eps(outcomes.eps[worst], spec.norm)}, where they are most"
    detail = f"The last quarter of its {steps} steps breaks {seen if counts[worst] else f'none of {n} images at any eps'}"
    detail += "" if passed else f": {spec.name} had not converged, and more steps or restarts would break more"
    return passed, f"{detail}."
