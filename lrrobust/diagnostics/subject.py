"""What every check is given: a model, some images it classifies correctly, and what the run's attacks did to them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from lrrobust.attacks.build import Attack
from lrrobust.attacks.specs import AttackSpec
from lrrobust.diagnostics.noise import draw_noise
from lrrobust.diagnostics.outcomes import NormOutcomes, Outcomes
from lrrobust.evaluation.chunks import start_seed
from lrrobust.evaluation.judge import Judge
from lrrobust.threat import Norm, ThreatModel

#: Images beyond the sample that are loaded and attacked at a time.
PART = 64


def parts(places: NDArray[np.int64]) -> Iterator[list[int]]:
    return (places[first : first + PART].tolist() for first in range(0, len(places), PART))


@dataclass(frozen=True)
class Strike:
    """What an attack did to M images: which it broke, and the adversarial images (M, 3, H, W), clean where none."""

    is_broken: NDArray[np.bool_]
    adversarial: torch.Tensor


class _Narrowed(nn.Module):
    """A model that knows some of its classes only: logits (N, len(classes)), in their order."""

    def __init__(self, model: nn.Module, classes: torch.Tensor) -> None:
        super().__init__()
        self.model, self.classes = model, classes

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.model(images)[:, self.classes]


@dataclass(frozen=True)
class Subject:
    """A run's model and attacks, and some images of it that are correct when clean, spread over all.

    Attributes:
        judge: of the model, which is frozen, on the device of the images.
        images, labels, keys: the sample, (N, 3, H, W) in [0, 1], (N,), N names.
        outcomes: of all images correct when clean; the sample's come first.
        load: images, labels and keys of some of all of these, by their places.
        fingerprint: of the run; random numbers derive from it.
        eot_iter: passes that attacks average over at least, as many as the run's: none meets less of a randomised model.
        predicted: classes that the model takes images for, ascending, see `lrrobust.diagnostics.outcomes.predicted_classes`.
    """

    judge: Judge
    images: torch.Tensor
    labels: torch.Tensor
    keys: Sequence[str]
    outcomes: tuple[Outcomes, ...]
    load: Callable[[Sequence[int]], tuple[torch.Tensor, torch.Tensor, list[str]]]
    fingerprint: str
    predicted: tuple[int, ...] = ()
    eot_iter: int = 1

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def norms(self) -> list[NormOutcomes]:
        """Those in which something was attacked: a budget of 0 leaves nothing to find."""
        found: dict[Norm, list[Outcomes]] = {}
        for outcomes in self.outcomes:
            found.setdefault(outcomes.spec.norm, []).append(outcomes)
        has_budget = {outcomes.spec.norm for outcomes in self.outcomes if outcomes.has_budget}
        return [NormOutcomes(norm, tuple(attacks)) for norm, attacks in found.items() if norm in has_budget]

    def has_gradient(self) -> bool:
        """Whether the model's logits carry one to the images; black-box attacks need none."""
        with torch.enable_grad():
            image = self.images[:1].detach().clone().requires_grad_()
            logits = self.judge.model(image)
            return logits.requires_grad and torch.autograd.grad(logits.sum(), image, allow_unused=True)[0] is not None

    def on(self, places: Sequence[int]) -> Subject:
        """The same with other images, by their places among all; to be struck only, as outcomes are in another order."""
        images, labels, keys = self.load(places)
        return replace(self, images=images, labels=labels, keys=keys, outcomes=())

    def strike(self, spec: AttackSpec, eps: float, places: NDArray[np.int64], classes: Sequence[int] | None = None) -> Strike:
        """Attacks some images of the sample at one eps; every claim is judged as in a run, the first success kept.

        Starts differ from those of the run, as they do from spec to spec: they depend on the spec's name.

        Args:
            classes: where given, the attack sees these logits alone: ascending, two at least, the images' own among them.
        """
        spec = spec.model_copy(update={"eps": (eps,), "eot_iter": max(spec.eot_iter, self.eot_iter)})
        at = torch.from_numpy(places).to(self.labels.device)
        images, labels, keys = self.images[at], self.labels[at], [self.keys[place] for place in places]
        model, seen = self.judge.model, labels
        if classes is not None:
            kept = torch.tensor(classes, device=labels.device)
            model, seen = _Narrowed(model, kept), torch.searchsorted(kept, labels)
        strike = Strike(np.zeros(len(places), dtype=bool), images.clone())

        def claim(rows: Sequence[int], proposed: torch.Tensor, _: Sequence[float], is_last: Sequence[bool]) -> list[bool]:
            threat = ThreatModel(spec.norm, eps)
            chosen = torch.tensor(rows, device=images.device)
            verdict = self.judge.judge(images[chosen], labels[chosen], proposed, threat, [keys[row] for row in rows])
            is_new = verdict.is_adversarial.cpu().numpy() & ~strike.is_broken[rows]
            strike.adversarial[chosen[torch.from_numpy(is_new)]] = proposed[torch.from_numpy(is_new)].detach()
            strike.is_broken[rows] |= is_new
            return strike.is_broken[rows].tolist()

        def draw(row: int, eps: float, restart: int) -> torch.Generator:
            return self.generator(spec.name, keys[row], eps, restart)

        Attack(spec)(model, images, seen, batch_size=self.judge.batch_size, claim=claim, draw=draw)
        return strike

    def noisy(self, norm: Norm, eps: float, draw: int = 0, *, is_corner: bool = False) -> torch.Tensor:
        """The sample with noise of at most eps in the norm, in [0, 1], (N, 3, H, W)."""
        noise = [
            draw_noise(norm, eps, image.shape, self.generator("noise", key, eps, draw), is_corner=is_corner)
            for image, key in zip(self.images, self.keys, strict=True)
        ]
        return (self.images + torch.stack(noise).to(self.images)).clamp(0, 1)

    def generator(self, purpose: str, key: str, eps: float, restart: int = 0) -> torch.Generator:
        """Random numbers for one image, whatever images share its batch, and none that the run drew."""
        return torch.Generator().manual_seed(start_seed(self.fingerprint, f"diagnostics {purpose}", key, eps, restart))
