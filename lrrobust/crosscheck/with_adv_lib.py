"""adv-lib 0.2: counterparts of PGD in linf, of Carlini and Wagner's attack, of targeted FAB and of FMN.

Its PGD looks at iterates before each step, so that the last of its steps is never tried, and returns the clean
image where it found nothing. It has no PGD in l2. Its FAB has no search along the line to the clean image. The step
sizes of its FMN are lengths, ours are in units of the radius: it runs with those that it comes with. It returns images
and claims nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch

from lrrobust.attacks.specs import AttackSpec, CwSpec, FabSpec, FmnSpec
from lrrobust.crosscheck.peer import PeerAttack, claiming, is_plain_pgd
from lrrobust.threat import Norm
from lrrobust.torchvision_import import import_torchvision

import_torchvision()
from adv_lib import attacks  # noqa: E402

_ORDERS: dict[Norm, float] = {"linf": math.inf, "l2": 2, "l1": 1}


def find_attack(spec: AttackSpec) -> PeerAttack | None:
    attack = _attack_with(spec)
    return None if attack is None else claiming(attack)


def find_ensemble(norm: Norm) -> PeerAttack | None:
    return None


def _attack_with(spec: AttackSpec) -> Callable[..., torch.Tensor] | None:
    """Its attack on a model, images and labels, with a budget that its minimal-norm attacks pass over."""
    if is_plain_pgd(spec) and spec.norm == "linf":
        step_size = spec.step_size_ratio / spec.steps
        return partial(attacks.pgd_linf, steps=spec.steps, random_init=spec.random_start, relative_step_size=step_size)
    if isinstance(spec, CwSpec):
        attack = partial(
            attacks.carlini_wagner_l2,
            confidence=spec.confidence,
            learning_rate=spec.lr,
            initial_const=spec.initial_c,
            binary_search_steps=spec.binary_search_steps,
            max_iterations=spec.steps,
            abort_early=spec.abort_early,
        )
    elif isinstance(spec, FabSpec):
        attack = partial(
            attacks.fab,
            norm=_ORDERS[spec.norm],
            n_iter=spec.steps,
            alpha_max=spec.largest_pull,
            eta=spec.overshoot,
            beta=spec.backward_share,
            restarts=spec.targets,
            targeted_restarts=True,
        )
    elif isinstance(spec, FmnSpec):
        changes = {"γ_init": spec.first_change, "γ_final": spec.last_change}
        attack = partial(attacks.fmn, norm=_ORDERS[spec.norm], steps=spec.steps, **changes)
    else:
        return None
    return lambda model, images, labels, _: attack(model, images, labels)
