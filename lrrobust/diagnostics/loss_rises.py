"""Does the loss rise from the first step of an attack to the last?"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from lrrobust.diagnostics.decision import SIGNIFICANCE
from lrrobust.diagnostics.outcomes import aims_at_classes, is_multi_step
from lrrobust.diagnostics.records import Diagnostic
from lrrobust.diagnostics.subject import Subject
from lrrobust.formatting import format_count, format_eps
from lrrobust.stats import binomial_p_value

#: Share of images on which the loss of a sound attack may end no higher than at the clean image: such whose
#: random start was unlucky at a small budget.
TOLERATED_FAILURES = 0.05


def check_loss_rises(subject: Subject) -> Iterator[Diagnostic]:
    """One result for each attack of several gradient steps, at the budget where it looks worst.

    From the rows: the last proposal for an image that withstood must at least be nearer to a misclassification than
    the clean image, in logits. Images that broke have shown that it was. Where the last start led to a class of its own
    choice, rows do not tell: on the way to the ninth likeliest class, the nearest one may fall behind.
    """
    for outcomes in subject.outcomes:
        if not is_multi_step(outcomes.spec):
            continue
        if aims_at_classes(outcomes.spec):
            name = outcomes.spec.name
            detail = f"{name} aims at one class after the other: where its last start ended says nothing of the nearest class."
            yield Diagnostic(name="loss_rises", passed=None, detail=detail, attack=name, norm=outcomes.spec.norm)
            continue
        worst, tested, most = None, 0, 0
        for level, eps in enumerate(outcomes.eps):
            is_known = outcomes.is_attacked[level] & (outcomes.is_broken[level] | np.isfinite(outcomes.last_margin[level]))
            # NaN, of broken images, compares as False.
            idle, n = int((outcomes.last_margin[level] >= outcomes.clean_margin).sum()), int(is_known.sum())
            # Up to rounding of a sum.
            still = int(np.isclose(outcomes.last_margin[level], outcomes.clean_margin, rtol=1e-5, atol=0).sum())
            if eps == 0 or n == 0:
                continue
            tested, most = tested + 1, max(most, n)
            p_value = binomial_p_value(idle, n, TOLERATED_FAILURES)
            if worst is None or (p_value, -idle / n) < worst[:2]:
                worst = p_value, -idle / n, idle, n, eps, still
        if worst is None:
            continue
        p_value, _, idle, n, eps, still = worst
        passed = p_value * tested > SIGNIFICANCE
        seen = f"{idle} of {n} images at eps {format_eps(eps, outcomes.spec.norm)}, where they are most"
        detail = (
            f"After the last step of {outcomes.spec.name} the margin is no smaller than that of the clean image for "
            f"{seen if idle else 'none of the images at any eps'}"
        )
        if not passed and 2 * still > idle:
            detail += (
                ", for most the very same: logits do not change along the way, as where networks vote or probabilities round "
                "to 0 and 1. hop_skip_jump needs the class alone; --surrogate attacks the mean of those that vote"
            )
        elif not passed:
            detail += ": its steps lead nowhere, as with gradients that are zero or noise"
        if binomial_p_value(most, most, TOLERATED_FAILURES) * tested > SIGNIFICANCE:
            passed = None
            detail += f"; of {format_count(most, 'image')} no more can be said"
        yield Diagnostic(
            name="loss_rises", passed=passed, detail=f"{detail}.", attack=outcomes.spec.name, norm=outcomes.spec.norm
        )
