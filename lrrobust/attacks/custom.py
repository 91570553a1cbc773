"""Attacks of one's own: a function proposes images, and they are judged as those of any other attack."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn

from lrrobust.attacks.assignment import Assignment, Passes
from lrrobust.attacks.specs import CustomSpec
from lrrobust.eps import Ladder
from lrrobust.errors import ConfigError
from lrrobust.loaded_code import describe_callable
from lrrobust.mistakes import brief, describe_mistake, explain_mistakes
from lrrobust.norm import Norm
from lrrobust.user_file import run_user_file

#: (model, images, labels, eps) -> proposals.
Propose = Callable[[nn.Module, torch.Tensor, torch.Tensor, float], torch.Tensor]


@dataclass(frozen=True)
class CustomAttack:
    """A function that proposes adversarial images, for `attacks` of `lrrobust.evaluate`, or for `--attack FILE.py:NAME`.

    Args:
        propose: called with a model in evaluation mode, images (n, C, H, W) in [0, 1], float32, their labels (n,), int64, and
            a budget in pixel units of [0, 1]; returns images of that shape. What does not lie in the ball around its image
            and in [0, 1], or is not finite, counts as a failure. torch's random numbers are seeded before. Images that it
            broke at a smaller budget are not among those of a larger one.
        norm: of the ball: "linf", "l2" or "l1".
        eps: budgets, ascending, such as 0.01 or "2/255".
        name: for tables, of lower-case letters, digits, "_" and "-"; that of the function where not given.
        passes: forward passes for an image and budget, about, which the time left is told by.
    """

    propose: Propose
    norm: Norm
    eps: Sequence[float | str]
    name: str | None = None
    passes: int = 100

    def spec(self, file: bytes = b"") -> CustomSpec:
        """The checked form that runs keep.

        The code of the function is part of it, with what it reaches: see `lrrobust.loaded_code.describe_callable`.

        Args:
            file: content of the file that it stands in, of which then all is part of it.

        Raises:
            ConfigError: a setting is wrong.
        """
        if not callable(self.propose):
            raise ConfigError(f"custom attack: propose: expected a function, found {type(self.propose).__name__}")
        name = getattr(self.propose, "__name__", "") if self.name is None else self.name
        # Addresses of objects differ from process to process.
        code = re.sub(r"0x[0-9a-f]+", "", describe_callable(self.propose))
        code_sha256 = hashlib.sha256(code.encode() + file).hexdigest()
        return check_custom(
            {"name": name, "norm": self.norm, "eps": self.eps, "passes": self.passes, "code_sha256": code_sha256}, self.propose
        )


def load_custom(name: str) -> CustomSpec:
    """Runs a file and takes an attack from it, `path/to/file.py:attack`.

    Raises:
        ConfigError: there is no such file, it fails, or what it calls so is no `CustomAttack`.
    """
    file, called = name.rsplit(":", 1)

    def take(module: ModuleType) -> CustomSpec:
        attack = getattr(module, called, None)
        if not isinstance(attack, CustomAttack):
            found = "nothing" if attack is None else type(attack).__name__
            raise ConfigError(f"{name}: expected a lrrobust.CustomAttack of this name, found {found}")
        return attack.spec(Path(file).read_bytes())

    return run_user_file(file, "expected path/to/file.py:attack", take, ConfigError)


def check_custom(settings: dict[str, Any], propose: Propose) -> CustomSpec:
    """The spec of these settings, of which `eps` may be written as people do.

    Raises:
        ConfigError: a setting is wrong.
    """
    settings = {"kind": "custom", **settings}
    try:
        eps = settings["eps"]
        budgets = [eps] if isinstance(eps, (str, int, float)) else list(eps)
        # Through JSON, as strict models take JSON's lists for tuples but not Python's.
        return CustomSpec(**{**settings, "eps": TypeAdapter(Ladder).validate_json(json.dumps(budgets))}, propose=propose)
    except TypeError:
        told = f"eps: expected budgets such as ['2/255', '4/255'], found {brief(settings['eps'])}"
    except ValidationError as error:
        is_of_eps = error.title != CustomSpec.__name__
        told = f"eps: {describe_mistake(error.errors()[0])}" if is_of_eps else explain_mistakes(error, settings, CustomSpec)
    raise ConfigError(f"custom attack {settings['name']!r}: {told}")


def run_custom(spec: CustomSpec, given: Assignment) -> Passes:
    """Lets the function propose at every budget, from the smallest up, for images that none has broken; all is claimed.

    Returns:
        Images through the model, forward and backward, by budget and image, int64 (L, N); a batch shares its own evenly.

    Raises:
        ConfigError: it returns anything but images of the same shape.
    """
    forward, backward = torch.zeros(2, len(given.ladder), len(given.images), dtype=torch.int64)
    standing = torch.ones(len(given.images), dtype=torch.bool)
    counted = _Counted(given.model).eval()
    for level, eps in enumerate(given.ladder):
        # Nothing is claimed at a budget of 0.
        attacked = (standing & (given.levels > level)).nonzero().flatten() if eps > 0 else torch.empty(0, dtype=torch.int64)
        for rows in attacked.split(given.batch_size) if len(attacked) else ():
            at = rows.to(given.images.device)
            counted.forward_count = counted.backward_count = 0
            # Copies, which the function may change.
            proposed = spec.propose(counted, given.images[at], given.labels[at], eps)
            _check_proposals(spec, proposed, (len(rows), *given.images.shape[1:]))
            forward[level, rows], backward[level, rows] = (
                -(-count // len(rows)) for count in (counted.forward_count, counted.backward_count)
            )
            proposed = proposed.detach().to(given.images)
            is_broken = given.claim(rows.tolist(), proposed, [eps] * len(rows), [True] * len(rows))
            standing[rows] = ~torch.tensor(is_broken)
    return forward, backward


class _Counted(nn.Module):
    """A model that counts images through it, there and back."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.forward_count = self.backward_count = 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.forward_count += len(images)
        logits = self.model(images)
        if logits.requires_grad:
            logits.register_hook(self._count_backward)
        return logits

    def _count_backward(self, gradient: torch.Tensor) -> None:
        self.backward_count += len(gradient)


def _check_proposals(spec: CustomSpec, proposed: Any, expected: tuple[int, ...]) -> None:
    if not isinstance(proposed, torch.Tensor):
        raise ConfigError(f"{spec.name}: expected a tensor of proposed images, returned {type(proposed).__name__}")
    found = tuple(proposed.shape)
    if found != expected or not proposed.is_floating_point():
        raise ConfigError(f"{spec.name}: expected proposed images {expected} of floats, returned {found} of {proposed.dtype}")
