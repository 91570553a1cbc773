"""MI-FGSM: gradient sign steps with momentum, whose images carry over to other models better."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lrrobust.attacks.assignment import Assignment, Passes
from lrrobust.attacks.ball import project, unit
from lrrobust.attacks.climb import Search, Start, State, Step, climb, evaluate, is_misclassified
from lrrobust.attacks.losses import log_odds
from lrrobust.threat import Norm


def mi_fgsm(
    given: Assignment,
    *,
    norm: Norm,
    steps: int,
    step_size_ratio: float,
    decay: float,
) -> Passes:
    """Attack images at every budget, from the smallest up, until they are broken.

    From the image itself, `steps` steps of length step_size_ratio * eps / steps along the sign (linf) or
    direction (l2) of a sum of gradients, each divided by its l1 length, in which those of earlier steps
    count `decay` times less with every step. The loss is `losses.log_odds`; but for its length, which is
    divided away, its gradient is that of the cross-entropy.

    Args:
        given: the images, and who judges; its `draw` is not used, as nothing is random.
        norm: "linf" or "l2".

    Returns:
        Forward and backward passes by budget and image, int64 (len(ladder), N): one each a step.

    Source: Dong et al., Boosting Adversarial Attacks with Momentum, 2018, section 3.1, algorithm 1.
    """
    taken = climb(given, starts=1, steps=steps, search=_MomentumSteps(given, norm, step_size_ratio / steps, decay))
    return taken, taken


class _MomentumSteps(Search):
    """The search, as `lrrobust.attacks.climb` takes it."""

    def __init__(
        self,
        given: Assignment,
        norm: Norm,
        step_share: float,
        decay: float,
    ) -> None:
        self._given, self._norm = given, norm
        self._step_share, self._decay = step_share, decay

    def begin(self, starts: Sequence[Start]) -> State:
        iterate = self._given.images[[start.row for start in starts]]
        return {"iterate": iterate, "momentum": torch.zeros_like(iterate)}

    def step(self, state: State) -> Step:
        iterate, images, labels = state["iterate"], self._given.images[state["row"]], self._given.labels[state["row"]]
        logits, _, gradient = evaluate(self._given.model, iterate, lambda logits: log_odds(logits, labels))
        length = gradient.double().abs().sum((1, 2, 3), keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
        state["momentum"] = self._decay * state["momentum"] + (gradient / length).to(gradient)
        moved = iterate + self._step_share * state["eps"] * unit(state["momentum"], self._norm)
        state["iterate"] = project(images, moved, state["eps"], self._norm)
        return Step(iterate, is_misclassified(logits, labels), state["iterate"])
