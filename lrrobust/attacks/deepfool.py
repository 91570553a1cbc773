"""DeepFool: across the nearest of the linearised boundaries, again and again until the class is left."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from lrrobust.attacks.assignment import Assignment, Passes
from lrrobust.attacks.ball import dual_length
from lrrobust.attacks.climb import Search, Start, State, Step, is_clearly_misclassified, rounding
from lrrobust.attacks.hyperplane import way_to_hyperplane
from lrrobust.attacks.losses import lead_of
from lrrobust.attacks.minimal_norm import find_nearest
from lrrobust.attacks.targets import choose_targets, with_the_choice
from lrrobust.norm import LinfOrL2


def deepfool(
    given: Assignment,
    *,
    norm: LinfOrL2,
    targets: int,
    steps: int,
    overshoot: float,
    enough: float,
) -> Passes:
    """Look for a near adversarial image of each image.

    Every step linearises the differences between the logits of the likeliest other classes and that of the label, goes
    the shortest of the ways to where one of them would be zero, and a bit beyond. The first misclassified iterate is
    the result; nothing draws it nearer, so distances are upper bounds that cost little.

    Ways do not leave the box; the paper's do, and are cut off.

    Args:
        given: the images, and who judges; its `draw` is not used, as nothing is random.
        norm: "linf" or "l2".
        targets: how many classes are looked at, those that are likeliest at the clean image; K - 1 at most.
        steps: at most so many.
        overshoot: how much farther than to the boundary a step goes, as a share of its way.
        enough: not used, the first adversarial image ends the search.

    Returns:
        Forward and backward passes by budget and image, int64 (1, N): one forward and `targets` backward passes a
        step, and a forward pass to choose the classes.

    Source: Moosavi-Dezfooli et al., DeepFool: a simple and accurate method to fool deep neural networks, 2016,
    algorithm 2 and section 3.3 (other norms).
    """
    chosen = choose_targets(given, "top_k", targets)
    taken, _ = find_nearest(
        given,
        norm=norm,
        starts=1,
        # What the last step leads to is looked at as well.
        steps=steps + 1,
        line_search_steps=0,
        enough=math.inf,
        search=_NearestBoundarySteps(given, norm, chosen, 1 + overshoot),
    )
    return with_the_choice(taken), taken * chosen.shape[1]


class _NearestBoundarySteps(Search):
    """The search, as `lrrobust.attacks.climb` takes it."""

    def __init__(
        self,
        given: Assignment,
        norm: LinfOrL2,
        targets: torch.Tensor,
        stretch: float,
    ) -> None:
        self._given, self._norm = given, norm
        self._targets, self._stretch = targets, stretch

    def begin(self, starts: Sequence[Start]) -> State:
        return {"iterate": self._given.images[[start.row for start in starts]]}

    def step(self, state: State) -> Step:
        labels, iterate = self._given.labels[state["row"]], state["iterate"].detach().requires_grad_()
        logits = self._given.model(iterate)
        beyond = 2 * rounding(logits.detach())
        nearest = iterate.new_full((len(labels),), math.inf, dtype=torch.float64)
        rise, normal = torch.zeros_like(nearest), torch.zeros_like(iterate)
        classes = self._targets[state["row"]].unbind(1)
        for number, target in enumerate(classes, 1):
            lead = lead_of(logits, target, labels)
            (gradient,) = torch.autograd.grad(lead.sum(), iterate, retain_graph=number < len(classes))
            missing = beyond - lead.detach()
            slope = dual_length(gradient, self._norm).clamp_min(torch.finfo(torch.float64).tiny)
            is_nearer = missing.abs() / slope < nearest
            nearest = torch.where(is_nearer, missing.abs() / slope, nearest)
            rise = torch.where(is_nearer, missing, rise)
            normal = torch.where(is_nearer[:, None, None, None], gradient, normal)
        seen = iterate.detach()
        way = way_to_hyperplane(seen, normal, rise, self._norm)
        state["iterate"] = (seen + self._stretch * way).clamp(0, 1)
        return Step(seen, is_clearly_misclassified(logits.detach(), labels), state["iterate"])
