"""Attacks whose gradients are taken of smoother functions than the network, for layers that can hide theirs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from lrrobust.attacks.assignment import Assignment, Passes
from lrrobust.gradient_rules import GradientRule, gradients_by


def attack_by_rules(
    attack: Callable[..., Passes],
    given: Assignment,
    *,
    rules: Sequence[GradientRule],
    restarts: int,
    **settings: Any,
) -> Passes:
    """Attack by one gradient rule after the other; each rule gets the budgets at which an image still stands.

    What the model computes is the same throughout, so that claims are judged as ever; only the directions
    differ. In a network without layers that know such rules, such as a convolutional one, every rule gives
    the network's own gradient: the attack is then `attack` with len(rules) * restarts random restarts, of the
    same cost.

    Args:
        attack: climbs a ladder of budgets, such as `lrrobust.attacks.pgd.pgd`.
        given: the images, and who judges.
        rules: what the gradient is taken of, in this order.
        restarts: random starts by each rule.
        settings: further arguments of `attack`.

    Returns:
        Forward and backward passes by budget and image, int64 (len(ladder), N). A pass by a rule other than
        "exact" computes every layer that follows the rule twice.

    Source: Athalye et al., Obfuscated Gradients Give a False Sense of Security, 2018, section 4.1 (backward pass
    differentiable approximation); Tramer et al., On Adaptive Attacks to Adversarial Example Defenses, 2020.
    """
    ladder = given.ladder
    standing = given.levels.clone()
    forward, backward = (torch.zeros(len(ladder), len(given.images), dtype=torch.int64) for _ in range(2))

    def claim_and_note(
        rows: Sequence[int], proposals: torch.Tensor, eps: Sequence[float], is_last: Sequence[bool]
    ) -> Sequence[bool]:
        is_broken = given.claim(rows, proposals, eps, is_last)
        for row, budget, broken in zip(rows, eps, is_broken, strict=True):
            if broken:
                standing[row] = min(int(standing[row]), ladder.index(budget))
        return is_broken

    for position, rule in enumerate(rules):

        def draw_anew(row: int, eps: float, restart: int, first: int = position * restarts) -> torch.Generator:
            return given.draw(row, eps, first + restart)

        with gradients_by(given.model, rule):
            left = replace(given, levels=standing.clone(), claim=claim_and_note, draw=draw_anew)
            spent = attack(left, restarts=restarts, **settings)
        forward += spent[0]
        backward += spent[1]
    return forward, backward
