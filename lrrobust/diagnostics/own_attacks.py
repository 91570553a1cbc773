"""Attacks that the diagnostics make themselves, beside those of the run."""

from __future__ import annotations

from dataclasses import dataclass

from lrrobust.attacks.specs import ApgdSpec, AttackSpec, PgdSpec
from lrrobust.threat import Norm

#: PGD of so many steps that may cross the ball has converged on sound networks.
PGD_STEPS = 40

#: Classes that an image is driven towards, and steps towards each: few are enough, as decoys hide most images.
TARGETS, TARGETED_STEPS = 3, 10

#: Share of the values that a step in l1 changes, for networks with gradients in few of them, as adversarial training leaves.
SPARSE = 0.002


def plain_pgd(norm: Norm, steps: int = PGD_STEPS, name: str = "pgd") -> PgdSpec:
    """From a random start, across the ball."""
    return PgdSpec(name=name, kind="pgd", norm=norm, eps=(0.0,), steps=steps)


@dataclass(frozen=True)
class NewStart:
    """One of several attacks that take turns on what the ones before left standing.

    Attributes:
        what: how it is called in a sentence.
        why: what it says of the run's attacks where it breaks what they could not.
        is_narrowed: whether it sees those classes alone that the model takes images for.
    """

    spec: AttackSpec
    what: str
    why: str
    is_narrowed: bool = False


def new_starts(norm: Norm, steps: int, name: str) -> tuple[NewStart, ...]:
    """PGD as plain as it is, and what finds adversarial images where it does not.

    Where logits are small, their softmax is flat, and the gradient of the cross-entropy leads away from the mean of the other
    classes instead of to the nearest: in linf and l2 Auto-PGD climbs a loss that the scale of the logits does not matter to. In
    l1 the share of values that a step changes matters as much: there PGD has a smaller one.

    Losses of the largest logits, and searches towards the likeliest classes, see nothing of the others where classes follow the
    leading one that no image is ever taken for: the last attack leads to such classes only that some are taken for.
    """
    what = f"PGD in {norm} from a new start with {steps} steps"
    found = [NewStart(plain_pgd(norm, steps, name), what, "they had not converged")]
    if norm == "l1":
        sparse = plain_pgd(norm, steps, f"{name}_sparse").model_copy(update={"sparsity": SPARSE})
        what = f"PGD whose steps change {100 * SPARSE:g} % of the values"
        found.append(NewStart(sparse, what, "their steps change more values than they should"))
    else:
        dlr = ApgdSpec(name=f"{name}_dlr", kind="apgd", norm=norm, eps=(0.0,), loss="dlr", steps=steps)
        what = "Auto-PGD on the DLR loss, which the scale of logits does not matter to,"
        found.append(NewStart(dlr, what, "the losses they climb lead elsewhere, as the cross-entropy of small logits does"))
    aimed = plain_pgd(norm, TARGETED_STEPS, f"{name}_targets").model_copy(
        update={"loss": "margin", "target": "top_k", "targets": TARGETS, "sparsity": SPARSE}
    )
    why = "the classes that they aim at, or whose lead they climb, are none that images are taken for, as decoys are"
    found.append(NewStart(aimed, "PGD towards classes that the model does take images for", why, is_narrowed=True))
    return tuple(found)


def single_step(norm: Norm) -> PgdSpec:
    """One gradient step across the whole ball, from the image."""
    return PgdSpec(name="single_step", kind="pgd", norm=norm, eps=(0.0,), steps=1, step_size_ratio=1.0, random_start=False)
