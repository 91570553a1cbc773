"""Auto-PGD: gradient ascent with momentum whose step size follows from how the ascent goes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch

from lrrobust.attacks.assignment import Assignment, Passes
from lrrobust.attacks.ball import largest_signs, project, surface_start, unit
from lrrobust.attacks.climb import Start, State, Step, climb, evaluate, is_misclassified
from lrrobust.attacks.losses import dlr, log_odds, targeted_dlr
from lrrobust.attacks.targets import choose_targets, with_the_choice
from lrrobust.threat import Norm

ApgdLoss = Literal["ce", "dlr", "targeted_dlr"]

#: Weight of the gradient step; the rest is the step before.
_STEP_WEIGHT = 0.75

#: First step size, in units of eps.
_FIRST_STEP = 2.0

#: In l1, the radii of the balls in units of eps, and the share of the steps that ends each.
_BALLS = ((3, 0.3), (2, 0.6), (1, 1.0))

#: In l1: share of the values that first steps change (0.2 in the paper), and of the steps between checkpoints; below which
#: share of before the best is sparser; factor of shorter steps; the shortest.
_FIRST_SHARE, _CHECKED_SHARE, _SPARSER, _SHRINKAGE, _SHORTEST = 0.1, 0.04, 0.95, 1 / 1.5, 0.1


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

    In l1 there is no momentum. A step changes the values of the largest gradients alike, two thirds as many as the best
    perturbation does. Its length is the radius of the ball at first, and again where a checkpoint, one every 4 % of the
    steps, finds that perturbation sparser; the search then goes back to it. Other checkpoints shorten the steps. The first
    30 % of the steps are in a ball of 3 eps, the next 30 % in one of 2 eps, and the best of each begins the next.

    With `warm_start` the first restart at the next larger budget begins where the one before was best,
    the perturbation stretched to the larger ball.

    Args:
        given: the images, and who judges; the restarts of one target are drawn after those of another.
        norm: "linf", "l2" or "l1".
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
    Parameter-free Attacks, 2020, sections 3 and 4, algorithm 1; l1: the same, Mind the box, 2021.
    """
    chosen = None
    if loss == "targeted_dlr":
        chosen = choose_targets(given, "top_k", targets)
    ascent = _SparseAscent if norm == "l1" else _Ascent
    search = ascent(given, norm, loss, chosen, steps, rho, restarts, warm_start)
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


def sparse_schedule(steps: int) -> tuple[list[int], list[bool]]:
    """In l1: radii of the balls of iterates 0 .. steps, in units of eps; which are checkpoints.

    >>> sparse_schedule(5)
    ([3, 3, 2, 1, 1, 1], [False, True, False, False, True, True])
    """
    radii = [next((radius for radius, end in _BALLS if at < end * steps), 1) for at in range(steps + 1)]
    since = [at - radii.index(radius) for at, radius in enumerate(radii)]
    every = max(int(_CHECKED_SHARE * steps), 1)
    return radii, [after > 0 and after % every == 0 for after in since]


class _Ascent:
    """Auto-PGD's search, as `lrrobust.attacks.climb` takes it."""

    #: Radius of the ball of the first iterate, in units of eps.
    _first_radius = 1

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
        radius = self._first_radius * _each(eps)
        iterate = project(self._given.images[rows], iterate, radius, self._norm)
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
        return self._draw(image, eps, self._given.draw(start.row, eps, start.number))

    def _draw(self, image: torch.Tensor, eps: float, generator: torch.Generator) -> torch.Tensor:
        return surface_start(image, self._norm, eps, generator)

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
        self._move(state, images, loss, gradient)
        return Step(iterate, is_misclassified(logits, labels), state["iterate"])

    def _move(self, state: State, images: torch.Tensor, loss: torch.Tensor, gradient: torch.Tensor) -> None:
        iterate, is_halved = state["iterate"], self._check(state)
        base = torch.where(_each(is_halved), state["best"], iterate)
        gradient = torch.where(_each(is_halved), state["best_gradient"], gradient)
        eps = state["eps"]
        ahead = project(images, base + state["step_size"] * unit(gradient, self._norm), eps, self._norm)
        # The first step has none before it.
        weight = torch.where(_each(state["steps"] == 0), 1.0, _STEP_WEIGHT).to(base)
        moved = base + weight * (ahead - base) + (1 - weight) * (base - state["previous"])
        state["previous"], state["iterate"] = base, project(images, moved, eps, self._norm)
        state["last_loss"] = torch.where(is_halved, state["best_loss"], loss)

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


class _SparseAscent(_Ascent):
    """The search in l1."""

    _first_radius = _BALLS[0][0]

    def __init__(self, given: Assignment, *arguments: Any) -> None:
        super().__init__(given, *arguments)
        radii, is_checkpoint = sparse_schedule(len(self._windows))
        self._radii = given.images.new_tensor(radii)
        self._is_checkpoint = torch.tensor(is_checkpoint, device=given.images.device)

    def _draw(self, image: torch.Tensor, eps: float, generator: torch.Generator) -> torch.Tensor:
        return image + torch.randn(image.shape, generator=generator).to(image)

    def begin(self, starts: Sequence[Start]) -> State:
        state = super().begin(starts)
        known = torch.full_like(state["rises"], state["iterate"][0].numel())
        step_size = state["step_size"] / _FIRST_STEP * self._first_radius
        return {**state, "step_size": step_size, "values": (_FIRST_SHARE * known).ceil().long(), "checked_values": known}

    def step(self, state: State) -> Step:
        # What is found in larger balls is no success.
        is_within = self._radii[state["steps"]] == 1
        found = super().step(state)
        return found._replace(is_wrong=found.is_wrong & is_within)

    def _move(self, state: State, images: torch.Tensor, loss: torch.Tensor, gradient: torch.Tensor) -> None:
        radius, following = (_each(self._radii[state["steps"] + ahead]) * state["eps"] for ahead in (0, 1))
        is_leaving = (following < radius).flatten()
        is_checkpoint = self._is_checkpoint[state["steps"]] | is_leaving
        changed = (state["best"] != images).flatten(1).sum(1)
        is_sparser = is_checkpoint & (changed < _SPARSER * state["checked_values"])
        shorter = (_SHRINKAGE * state["step_size"]).maximum(_SHORTEST * radius)
        step_size = torch.where(_each(is_checkpoint), shorter, state["step_size"])
        step_size = torch.where(_each(is_sparser), radius, step_size)
        # Rounded down: steps of two values would stay with two.
        fitting = (_SHRINKAGE * changed).long().clamp_min(1)
        state["values"] = torch.where(is_checkpoint, fitting, state["values"])
        goes_back = _each(is_sparser | is_leaving)
        base = torch.where(goes_back, state["best"], state["iterate"])
        direction = largest_signs(torch.where(goes_back, state["best_gradient"], gradient), state["values"])
        state["iterate"] = project(images, base + step_size * direction, following, self._norm)
        state["step_size"] = torch.where(_each(is_leaving), following, step_size)
        state["checked_values"] = torch.where(is_checkpoint, changed, state["checked_values"])
        # Losses of a larger ball are out of reach.
        state["best_loss"] = state["best_loss"].masked_fill(is_leaving, -math.inf)


def _each(values: torch.Tensor) -> torch.Tensor:
    """(n,) -> (n, 1, 1, 1)."""
    return values[:, None, None, None]
