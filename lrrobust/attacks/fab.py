"""FAB, targeted: from the boundary of the class, linearised at ever nearer images, to the nearest adversarial one."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lrrobust.attacks.assignment import Assignment, Passes
from lrrobust.attacks.climb import Search, Start, State, Step, evaluate, is_clearly_misclassified, rounding
from lrrobust.attacks.hyperplane import way_to_hyperplane
from lrrobust.attacks.losses import lead_of
from lrrobust.attacks.minimal_norm import find_nearest
from lrrobust.attacks.targets import choose_targets, with_the_choice
from lrrobust.norm import LinfOrL2
from lrrobust.threat import distance

#: Steps of the last search, along the line to the clean image; the paper's number.
_LINE_SEARCH_STEPS = 3


def fab_t(
    given: Assignment,
    *,
    norm: LinfOrL2,
    targets: int,
    steps: int,
    overshoot: float,
    largest_pull: float,
    backward_share: float,
    enough: float,
) -> Passes:
    """Look for the nearest adversarial image of each image, across its boundary to each of the likeliest other classes.

    Every step linearises the difference of two logits, the target's and the label's, at the iterate. It goes to the
    hyperplane where that difference would be zero, and a bit beyond, by a mean of two shortest ways within the box:
    from the iterate, and from the clean image, which pulls the search towards it. Where any other class than the
    label wins, the iterate is adversarial, and the next step starts nearer to the clean image.

    Args:
        given: the images, and who judges; its `draw` is not used, as nothing is random.
        norm: "linf" or "l2".
        targets: starts, one for each of the likeliest other classes; K - 1 at most are taken.
        steps: steps of a start.
        overshoot: how far the ways go, in units of the way to the hyperplane; the paper's eta, 1 or more.
        largest_pull: largest weight of the way from the clean image; the paper's alpha_max.
        backward_share: share of an adversarial perturbation that is kept for the next step; the paper's beta.
        enough: an image is done as soon as its adversarial image is no farther away.

    Returns:
        Forward and backward passes by budget and image, int64 (1, N): two forward and one backward pass a step, a
        forward pass to choose targets, and those of the search along the line.

    Source: Croce and Hein, Minimally distorted Adversarial Attacks with a Fast Adaptive Boundary Attack, 2020,
    section 3, algorithm 1; targeted as in Croce and Hein, Reliable Evaluation of Adversarial Robustness with an
    Ensemble of Diverse Parameter-free Attacks, 2020, section 5.
    """
    chosen = choose_targets(given, "top_k", targets)
    taken, looked = find_nearest(
        given,
        norm=norm,
        starts=chosen.shape[1],
        steps=steps,
        line_search_steps=_LINE_SEARCH_STEPS,
        enough=enough,
        search=_BoundarySteps(given, norm, chosen, overshoot, largest_pull, backward_share),
    )
    return with_the_choice(2 * taken) + looked, taken


class _BoundarySteps(Search):
    """The search, as `lrrobust.attacks.climb` takes it; the number of a start is that of its target."""

    def __init__(
        self,
        given: Assignment,
        norm: LinfOrL2,
        targets: torch.Tensor,
        overshoot: float,
        largest_pull: float,
        backward_share: float,
    ) -> None:
        self._given, self._norm, self._targets = given, norm, targets
        self._overshoot, self._largest_pull, self._backward_share = overshoot, largest_pull, backward_share

    def begin(self, starts: Sequence[Start]) -> State:
        rows = [start.row for start in starts]
        return {"iterate": self._given.images[rows], "target": self._targets[rows, [start.number for start in starts]]}

    def step(self, state: State) -> Step:
        iterate, images, labels = state["iterate"], self._given.images[state["row"]], self._given.labels[state["row"]]
        logits, lead, gradient = evaluate(self._given.model, iterate, lambda logits: lead_of(logits, state["target"], labels))
        # In the linear model at the iterate, where the target just leads.
        rise = 2 * rounding(logits) - lead
        rise_anew = rise + (gradient.double() * (iterate - images)).sum((1, 2, 3))
        ahead = way_to_hyperplane(iterate, gradient, rise, self._norm)
        anew = way_to_hyperplane(images, gradient, rise_anew, self._norm)
        here, there = (distance(torch.zeros_like(way), way, self._norm) for way in (ahead, anew))
        pull = (here / (here + there).clamp_min(torch.finfo(torch.float64).tiny)).clamp_max(self._largest_pull)
        pull = pull[:, None, None, None].to(iterate)
        moved = (1 - pull) * (iterate + self._overshoot * ahead) + pull * (images + self._overshoot * anew)
        moved = moved.clamp(0, 1)
        with torch.no_grad():
            is_wrong = is_clearly_misclassified(self._given.model(moved), labels)
        nearer = images + self._backward_share * (moved - images)
        state["iterate"] = torch.where(is_wrong[:, None, None, None], nearer, moved)
        return Step(moved, is_wrong, moved)
