"""FMN: gradient steps in a ball that shrinks while the image is adversarial, and grows while it is not."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from lrrobust.attacks.assignment import Assignment, Passes
from lrrobust.attacks.ball import dual_length, inside_box, project, unit
from lrrobust.attacks.climb import Search, Start, State, Step, evaluate, is_clearly_misclassified, rounding
from lrrobust.attacks.losses import margin
from lrrobust.attacks.minimal_norm import find_nearest
from lrrobust.threat import Norm, box_diameter, distance

#: How many times faster the radius falls at most where the linearised boundary is far behind.
_FASTEST_FALL = 10


def fmn(
    given: Assignment,
    *,
    norm: Norm,
    steps: int,
    first_step_size: float,
    last_step_size: float,
    first_change: float,
    last_change: float,
    enough: float,
) -> Passes:
    """Look for the nearest adversarial image of each image with one gradient step after the other.

    Until the image is misclassified for the first time, the ball reaches as far as the linearised boundary at least, and
    grows in any case: the paper's can come to rest just before a boundary that bends away. From then on its radius
    shrinks by a share where the iterate is adversarial, and to the nearest one found where that is less, and grows by
    that share where it is not. It shrinks up to ten times faster where the linearised boundary is that far behind: a ball
    that has grown too large does not come down in time otherwise. Each step goes along the gradient of the margin and is
    then projected onto ball and box. Step sizes and shares fall along a cosine from their first to their last values.

    Step sizes are in units of the radius, where the paper's are lengths: it tunes them to each data set, and near
    images need shorter steps than far ones. A step size of 1 is a step of a radius' length in l2 and l1, and in linf
    one whose values are of the size of the radius in the root mean square.

    Args:
        given: the images, and who judges; its `draw` is not used, as nothing is random.
        norm: "linf", "l2" or "l1".
        steps: gradient steps.
        first_step_size, last_step_size: see above; the paper's alpha.
        first_change, last_change: shares by which the radius changes; the paper's gamma.
        enough: an image is done as soon as its adversarial image is no farther away.

    Returns:
        Forward and backward passes by budget and image, int64 (1, N): one each a step.

    Source: Pintor et al., Fast Minimum-norm Adversarial Attacks through Adaptive Norm Constraints, 2021, section 2,
    algorithm 1.
    """
    taken, _ = find_nearest(
        given,
        norm=norm,
        starts=1,
        steps=steps,
        line_search_steps=0,
        enough=enough,
        search=_ShrinkingBall(given, norm, steps, (first_step_size, last_step_size), (first_change, last_change)),
    )
    return taken, taken


class _ShrinkingBall(Search):
    """The search, as `lrrobust.attacks.climb` takes it."""

    def __init__(
        self,
        given: Assignment,
        norm: Norm,
        steps: int,
        step_sizes: tuple[float, float],
        changes: tuple[float, float],
    ) -> None:
        self._given, self._norm = given, norm
        images = given.images
        # The last step is not looked at any more: the smallest values belong to the one before.
        falling = (1 + torch.cos(math.pi * torch.arange(steps, dtype=torch.float64) / max(steps - 1, 1))) / 2
        self._step_sizes, self._changes = (
            (last + (first - last) * falling).to(images.device) for first, last in (step_sizes, changes)
        )
        self._farthest = box_diameter(norm, images[0].numel()) if len(images) else 0.0
        self._spread = math.sqrt(images[0].numel()) if norm == "linf" and len(images) else 1.0

    def begin(self, starts: Sequence[Start]) -> State:
        iterate = self._given.images[[start.row for start in starts]]
        unknown = iterate.new_full((len(starts),), math.inf, dtype=torch.float64)
        return {"iterate": iterate, "radius": torch.zeros_like(unknown), "shortest": unknown}

    def step(self, state: State) -> Step:
        iterate, images, labels = state["iterate"], self._given.images[state["row"]], self._given.labels[state["row"]]
        logits, lead, gradient = evaluate(self._given.model, iterate, lambda logits: margin(logits, labels))
        is_wrong = is_clearly_misclassified(logits, labels)
        length = distance(images, iterate, self._norm)
        shortest = torch.where(is_wrong, torch.minimum(length, state["shortest"]), state["shortest"])

        change = self._changes[state["steps"]]
        gradient = inside_box(gradient, iterate)
        slope = dual_length(gradient, self._norm).clamp_min(torch.finfo(torch.float64).tiny)
        to_boundary = length + (2 * rounding(logits) - lead) / slope
        growing = state["radius"] * (1 + change)
        growing = torch.where(shortest.isfinite(), growing, torch.maximum(growing, to_boundary))
        least = state["radius"] * (1 - (_FASTEST_FALL * change).clamp_max(0.5))
        shrinking = (state["radius"] * (1 - change)).minimum(to_boundary.maximum(least)).minimum(shortest)
        radius = torch.where(is_wrong, shrinking, growing).clamp_max(self._farthest)

        step_size = self._step_sizes[state["steps"]] * radius * self._spread
        moved = iterate + step_size[:, None, None, None].to(iterate) * unit(gradient, "l2")
        state["radius"], state["shortest"] = radius, shortest
        state["iterate"] = project(images, moved, radius[:, None, None, None].to(iterate), self._norm)
        return Step(iterate, is_wrong, state["iterate"])
