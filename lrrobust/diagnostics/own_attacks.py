"""Attacks that the diagnostics make themselves, beside those of the run."""

from __future__ import annotations

from lrrobust.attacks.specs import ApgdSpec, AttackSpec, PgdSpec
from lrrobust.threat import Norm

#: PGD of so many steps that may cross the ball has converged on sound networks.
PGD_STEPS = 40


def plain_pgd(norm: Norm, steps: int = PGD_STEPS, name: str = "pgd") -> PgdSpec:
    """From a random start, across the ball."""
    return PgdSpec(name=name, kind="pgd", norm=norm, eps=(0.0,), steps=steps)


def new_starts(norm: Norm, steps: int, name: str) -> list[AttackSpec]:
    """PGD as plain as it is, and in linf and l2 Auto-PGD on a loss that the scale of the logits does not matter to.

    Where logits are small, their softmax is flat, and the gradient of the cross-entropy leads away from the mean of the other
    classes instead of to the nearest.
    """
    found: list[AttackSpec] = [plain_pgd(norm, steps, name)]
    if norm != "l1":
        found.append(ApgdSpec(name=f"{name}_dlr", kind="apgd", norm=norm, eps=(0.0,), loss="dlr", steps=steps))
    return found


def single_step(norm: Norm) -> PgdSpec:
    """One gradient step across the whole ball, from the image."""
    return PgdSpec(
        name="single_step", kind="pgd", norm=norm, eps=(0.0,), steps=1, step_size_ratio=1.0, random_start=False
    )
