"""What a library of attacks is to us: a name, whether it is installed, and its counterparts of our attacks."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Protocol, TypeGuard

import torch
from torch import nn

from lrrobust.attacks.specs import AttackSpec, PgdSpec
from lrrobust.threat import Norm


@dataclass(frozen=True)
class Proposal:
    """What a library returned.

    Attributes:
        images: (n, C, H, W), as returned.
        is_claimed: which images it says it broke, bool (n,). Where a library says nothing, those whose returned
            image the model misclassifies, which is how its users count.
    """

    images: torch.Tensor
    is_claimed: torch.Tensor


#: model, images (n, C, H, W) in [0, 1], labels (n,), budget (infinity for a minimal-norm attack) -> proposal.
PeerAttack = Callable[[nn.Module, torch.Tensor, torch.Tensor, float], Proposal]


class Adapter(Protocol):
    """A module of this package that knows one library."""

    def find_attack(self, spec: AttackSpec) -> PeerAttack | None:
        """Its attack with the settings of `spec`, one start; None where it has none that does the same."""

    def find_ensemble(self, norm: Norm) -> PeerAttack | None:
        """Its strongest standard evaluation in this norm; None where it has none."""


@dataclass(frozen=True)
class Peer:
    """A library.

    Args:
        name: ours for it.
        modules: what it is imported as, the first that is installed is taken.
        distributions: what pip calls these.
        options: of pip, for what asks for versions that it does not need.
        adapter: name of the module here that knows it.
    """

    name: str
    modules: tuple[str, ...]
    distributions: tuple[str, ...]
    adapter: str
    options: str = ""

    def why_not(self) -> str | None:
        """Why it cannot take part, or None. Imports nothing."""
        if any(importlib.util.find_spec(module) is not None for module in self.modules):
            return None
        return f"{self.name} is not installed: pip install {self.options}{self.distributions[0]}"

    @property
    def version(self) -> str:
        for distribution in self.distributions:
            try:
                return version(distribution)
            except PackageNotFoundError:
                continue
        return "unknown"

    def load(self) -> Adapter:
        """Imports it.

        Raises:
            ImportError, or whatever its own code raises: it is not installed, or does not work here.
        """
        return importlib.import_module(f"lrrobust.crosscheck.{self.adapter}")


def is_plain_pgd(spec: AttackSpec) -> TypeGuard[PgdSpec]:
    """Whether an attack is PGD as libraries have it: by the cross-entropy, from the label, in linf or l2, each start anew."""
    is_pgd = isinstance(spec, PgdSpec) and spec.norm in ("linf", "l2")
    return is_pgd and spec.loss == "ce" and spec.target == "none" and not spec.warm_start


def claiming(attack: Callable[[nn.Module, torch.Tensor, torch.Tensor, float], torch.Tensor]) -> PeerAttack:
    """An attack that returns images alone, with its claim: those that the model misclassifies."""

    def propose(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, eps: float) -> Proposal:
        found = attack(model, images, labels, eps)
        with torch.no_grad():
            return Proposal(found, model(found).argmax(1) != labels)

    return propose


#: Every library that we know, in the order of the tables.
PEERS = {
    peer.name: peer
    for peer in (
        Peer("foolbox", ("foolbox",), ("foolbox",), "with_foolbox"),
        # The authors' own package is not on PyPI; pyautoattack is their code, packaged by others.
        Peer("autoattack", ("autoattack", "pyautoattack"), ("pyautoattack", "autoattack"), "with_autoattack", "--no-deps "),
        Peer("torchattacks", ("torchattacks",), ("torchattacks",), "with_torchattacks"),
        Peer("adv-lib", ("adv_lib",), ("adv-lib",), "with_adv_lib"),
    )
}
