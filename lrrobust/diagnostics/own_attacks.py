"""Attacks that the diagnostics make themselves, beside those of the run."""

from __future__ import annotations

from lrrobust.attacks.specs import PgdSpec
from lrrobust.threat import Norm

#: PGD of so many steps that may cross the ball has converged on sound networks.
PGD_STEPS = 40


def plain_pgd(norm: Norm, steps: int = PGD_STEPS, name: str = "pgd") -> PgdSpec:
    """From a random start, across the ball."""
    return PgdSpec(name=name, kind="pgd", norm=norm, eps=(0.0,), steps=steps)


def single_step(norm: Norm) -> PgdSpec:
    """One gradient step across the whole ball, from the image."""
    return PgdSpec(
        name="single_step", kind="pgd", norm=norm, eps=(0.0,), steps=1, step_size_ratio=1.0, random_start=False
    )
