"""Foolbox 3: counterparts of FGSM, PGD and Carlini and Wagner's attack.

It steps, starts and projects as we do. It returns the last iterate of PGD, so that an iterate that was adversarial
on the way is lost, and it attacks images again that are broken at a smaller budget. Its own success is the
criterion on the image clipped to the ball. Where Carlini and Wagner's attack finds nothing it returns a black image,
which counts as its success, at the distance of black, wherever the model takes black for another class.
"""

from __future__ import annotations

import math

import foolbox
import torch
from torch import nn

from lrrobust.attacks.specs import AttackSpec, CwSpec, FgsmSpec, PgdSpec
from lrrobust.crosscheck.peer import PeerAttack, Proposal, is_plain_pgd
from lrrobust.threat import Norm


def find_attack(spec: AttackSpec) -> PeerAttack | None:
    attacks = foolbox.attacks
    if isinstance(spec, FgsmSpec):
        return _attack_with(attacks.LinfFastGradientAttack())
    if is_plain_pgd(spec):
        return _attack_with(build_pgd(spec))
    if isinstance(spec, CwSpec):
        return _attack_with(
            attacks.L2CarliniWagnerAttack(
                binary_search_steps=spec.binary_search_steps,
                steps=spec.steps,
                stepsize=spec.lr,
                initial_const=spec.initial_c,
                confidence=spec.confidence,
                abort_early=spec.abort_early,
            )
        )
    return None


def find_ensemble(norm: Norm) -> PeerAttack | None:
    return None


def build_pgd(spec: PgdSpec) -> foolbox.attacks.Attack:
    """Its PGD in linf or l2 with the settings of `spec`, for any budget."""
    kind = foolbox.attacks.LinfPGD if spec.norm == "linf" else foolbox.attacks.L2PGD
    return kind(rel_stepsize=spec.step_size_ratio / spec.steps, steps=spec.steps, random_start=spec.random_start)


def build_victim(model: nn.Module, device: torch.device) -> foolbox.PyTorchModel:
    """The model as Foolbox takes it."""
    return foolbox.PyTorchModel(model, bounds=(0, 1), device=device)


def _attack_with(attack: foolbox.attacks.Attack) -> PeerAttack:
    def propose(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, eps: float) -> Proposal:
        victim = build_victim(model, images.device)
        _, clipped, is_adversarial = attack(victim, images, labels, epsilons=None if math.isinf(eps) else eps)
        return Proposal(clipped, is_adversarial)

    return propose
