"""Auto-PGD: gradient ascent with momentum whose step size follows from how the ascent goes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch

from lrrobust.attacks.assignment import Assignment, Passes
from lrrobust.attacks.ball import project, surface_start, unit
from lrrobust.attacks.climb import Start, State, Step, climb, evaluate, is_misclassified
from lrrobust.attacks.losses import dlr, log_odds, targeted_dlr
from lrrobust.attacks.targets import choose_targets, with_the_choice
from lrrobust.threat import Norm

ApgdLoss = Literal["ce", "dlr", "targeted_dlr"]

#: Weight of the gradient step; the rest is the step before.
_STEP_WEIGHT = 0.75

#: First step size, in units of eps.
_FIRST_STEP = 2.0


def apgd(
    given: Assignment,
    *,
    norm: Norm,
    loss: ApgdLoss,
    targets: int,
    steps: int,
    rho: float,
    restarts: int,
    warm_start: bool,
) -> Passes:
    """Attack images at every budget, from the smallest up, until they are broken.

    A start begins at a random point at distance eps, with steps of 2 eps. At the checkpoints (after 22 %
    of the steps, then at ever shorter intervals) the step size is halved, and the search goes back to the
    best point so far, where the loss rose in fewer than a share `rho` of the steps since the last
    checkpoint, or where neither step size nor best loss changed since then.

    The losses: "ce" is the cross-entropy in the form that confident models do not flatten,
    `losses.log_odds`; "dlr" and "targeted_dlr" ignore the scale of the logits. "targeted_dlr" makes one
    start for each of the `targets` classes that the model holds likeliest beside the label.

    With `warm_start` the first restart at the next larger budget begins where the one before was best,
    the perturbation stretched to the larger ball.

    Args:
        given: the images, and who judges; the restarts of one target are drawn after those of another.
        norm: "linf" or "l2".
        loss: see above.
        targets: at most K - 1 are taken; of no effect on the other losses.
        steps: gradient steps of a start.
        rho: see above.
        restarts: starts at a budget (and target).
        warm_start: see above.

    Returns:
        Forward and backward passes by budget and image; int64 (len(ladder), N). A step is one of each;
        choosing targets takes a forward pass of each image, at its first budget.

    Source: Croce and Hein, Reliable Evaluation of Adversarial Robustness with an Ensemble of Diverse
    Parameter-free Attacks, 2020, sections 3 and 4, algorithm 1.
    """
    chosen = None
    if loss == "targeted_dlr":
        chosen = choose_targets(given, "top_k", targets)
    search = _Ascent(given, norm, loss, chosen, steps, rho, restarts, warm_start)
    backward = climb(given, starts=restarts * search.targets_each, steps=steps, search=search)
    return backward if chosen is None else with_the_choice(backward), backward


def checkpoints(steps: int) -> list[int]:
    """For every iterate 0 .. steps - 1, the number of steps since the last checkpoint if it is one, else 0.

    >>> [at for at, window in enumerate(checkpoints(100)) if window]
    [22, 41, 57, 70, 80, 87, 93, 99]
    """
    window, shortest, decrease = (max(steps * percent // 100, 1) for percent in (22, 6, 3))
    windows, at = [0] * steps, window
    while at < steps:
        windows[at] = window
        window = max(window - decrease, shortest)
        at += window
    return windows


class _Ascent:
    """Auto-PGD's search, as `lrrobust.attacks.climb` takes it."""

    def __init__(
        self,
        given: Assignment,
        norm: Norm,
        loss: ApgdLoss,
        targets: torch.Tensor | None,
        steps: int,
        rho: float,
        restarts: int,
        warm_start: bool,
    ) -> None:
        self._given, self._targets, self._norm, self._loss, self._rho = given, targets, norm, loss, rho
        self._restarts, self._warm_start = restarts, warm_start
        self.targets_each = 1 if targets is None else targets.shape[1]
        self._windows = torch.tensor(checkpoints(steps), device=given.images.device)
        #: Best perturbations at the budget before, in units of it, by row and number of the start.
        self._best: dict[tuple[int, int], torch.Tensor] = {}

    def begin(self, starts: Sequence[Start]) -> State:
        eps = self._given.images.new_tensor([self._given.ladder[start.level] for start in starts])
        rows = torch.tensor([start.row for start in starts], device=eps.device)
        iterate = torch.stack([self._first_iterate(start) for start in starts])
        iterate = project(self._given.images[rows], iterate, eps[:, None, None, None], self._norm)
        unknown = eps.new_full((len(starts),), -math.inf, dtype=torch.float64)
        state = {
            "iterate": iterate,
            "previous": iterate,
            "step_size": _FIRST_STEP * eps[:, None, None, None],
            "best": iterate,
            "best_gradient": torch.zeros_like(iterate),
            "best_loss": unknown,
            "last_loss": -unknown,
            "rises": torch.zeros_like(rows),
            "checked_loss": unknown,
            # At the first checkpoint only the rises count.
            "is_halved": torch.ones_like(rows, dtype=torch.bool),
        }
        if self._targets is not None:
            numbers = torch.tensor([start.number // self._restarts for start in starts], device=eps.device)
            state["target"] = self._targets[rows, numbers]
        return state

    def _first_iterate(self, start: Start) -> torch.Tensor:
        image, eps = self._given.images[start.row], self._given.ladder[start.level]
        before = self._best.pop((start.row, start.number), None)
        if before is not None:
            return image + eps * before
        return surface_start(image, self._norm, eps, self._given.draw(start.row, eps, start.number))

    def end(self, starts: Sequence[Start], state: State) -> None:
        if not self._warm_start:
            return
        delta = (state["best"] - self._given.images[state["row"]]) / state["eps"]
        for start, perturbation in zip(starts, delta, strict=True):
            if start.number % self._restarts == 0:
                self._best[start.row, start.number] = perturbation

    def step(self, state: State) -> Step:
        iterate, images, labels = state["iterate"], self._given.images[state["row"]], self._given.labels[state["row"]]
        logits, loss, gradient = evaluate(self._given.model, iterate, lambda logits: self._losses(logits, labels, state))
        loss = loss.nan_to_num(nan=-math.inf)
        self._remember(state, loss, gradient)
        is_halved = self._check(state)

        base = torch.where(_each(is_halved), state["best"], iterate)
        gradient = torch.where(_each(is_halved), state["best_gradient"], gradient)
        eps = state["eps"]
        ahead = project(images, base + state["step_size"] * unit(gradient, self._norm), eps, self._norm)
        # The first step has none before it.
        weight = torch.where(_each(state["steps"] == 0), 1.0, _STEP_WEIGHT).to(base)
        moved = base + weight * (ahead - base) + (1 - weight) * (base - state["previous"])
        state["previous"], state["iterate"] = base, project(images, moved, eps, self._norm)
        state["last_loss"] = torch.where(is_halved, state["best_loss"], loss)
        return Step(iterate, is_misclassified(logits, labels), state["iterate"])

    def _losses(self, logits: torch.Tensor, labels: torch.Tensor, state: State) -> torch.Tensor:
        if self._loss == "targeted_dlr":
            return targeted_dlr(logits, labels, state["target"])
        return {"ce": log_odds, "dlr": dlr}[self._loss](logits, labels)

    @staticmethod
    def _remember(state: State, loss: torch.Tensor, gradient: torch.Tensor) -> None:
        """Counts rises, and keeps the best iterate with its loss and gradient."""
        state["rises"] = state["rises"] + (loss > state["last_loss"])
        is_best = loss > state["best_loss"]
        state["best"] = torch.where(_each(is_best), state["iterate"], state["best"])
        state["best_gradient"] = torch.where(_each(is_best), gradient, state["best_gradient"])
        state["best_loss"] = torch.where(is_best, loss, state["best_loss"])

    def _check(self, state: State) -> torch.Tensor:
        """At checkpoints, halves the step size where the search stalls; where it did, bool (n,)."""
        window = self._windows[state["steps"]]
        is_checkpoint = window > 0
        is_swinging = state["rises"] < self._rho * window
        is_idle = ~state["is_halved"] & (state["best_loss"] <= state["checked_loss"])
        is_halved = is_checkpoint & (is_swinging | is_idle)
        state["step_size"] = state["step_size"] * torch.where(_each(is_halved), 0.5, 1.0)
        state["is_halved"] = torch.where(is_checkpoint, is_halved, state["is_halved"])
        state["checked_loss"] = torch.where(is_checkpoint, state["best_loss"], state["checked_loss"])
        state["rises"] = torch.where(is_checkpoint, 0, state["rises"])
        return is_halved


def _each(values: torch.Tensor) -> torch.Tensor:
    """(n,) -> (n, 1, 1, 1)."""
    return values[:, None, None, None]
