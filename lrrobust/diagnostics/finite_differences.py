"""Is the gradient that attacks follow the slope of the model?"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from lrrobust.attacks.losses import log_odds
from lrrobust.diagnostics.decision import is_tolerable
from lrrobust.diagnostics.numerics import exact_model, explain_no_float64
from lrrobust.diagnostics.outcomes import is_black_box
from lrrobust.diagnostics.records import Diagnostic
from lrrobust.diagnostics.subject import Subject
from lrrobust.formatting import format_eps
from lrrobust.out_of_memory import is_out_of_memory

#: What is masked is masked for all images, or nearly: few are enough, and float64 on the CPU is slow; the fewer where images
#: have more values than these.
IMAGES, FEWEST, SMALL = 8, 4, 3 * 96 * 96

#: Changes of every value by so much, in pixel units: float64 resolves the difference of the losses to six digits, and
#: hardly a rectifier changes sides. At the second a loss without a slope, as of rounded images, gives itself away.
LENGTHS = (1e-6, 2.5e-7)

#: Of the slope: what gradient and differences may disagree by. On sound networks it is 1e-4 and less.
TOLERANCE = 0.1

#: The same in float32, where shorter changes are lost to rounding. Along them networks bend, and slopes may be nearly zero: the
#: disagreement is then measured over several directions, by the size of the gradient, of which it is 0.03 to 0.1 on most sound
#: networks, and at most 0.3 on a thousand images, behind a median. Where a tenth of the slopes stay the same by chance, as
#: behind float16, three quarters of the images do so once in 10,000.
ROUGH_LENGTHS, ROUGH_DIRECTIONS, ROUGH_TOLERANCE, ROUGH_SHARE = (2.5e-4, 1e-4), 8, 0.3, 0.75

#: Change of every value along the sign of the gradient, where losses of rounded images rise too: by what gradients at some
#: places on the way say, however networks bend. Sound ones rise by 0.95 to 1.05 of it at most images, such as round to 8
#: levels by 0.85, those that move, blur or compress besides by 0.15 to 0.65.
STEP, PLACES, SHORT = 4 / 255, 4, 0.7

#: Share of images on which they may disagree by more: 3 of 4092 on small networks of rectifiers and pooling do. Two of
#: eight fail.
TOLERATED_DIFFERING = 0.01


@dataclass(frozen=True)
class _Found:
    """On how many images gradient and differences disagree, of how many that have a slope."""

    differing: int
    compared: int


@torch.no_grad()
def check_finite_differences(subject: Subject) -> Iterator[Diagnostic]:
    """Whether the loss changes along random directions by what its gradient says; in float64, on the CPU.

    A gradient may be large and lead somewhere, and yet be a part of the whole, as where a branch or some pixels of a model
    are detached: attacks that follow it find less than there is. Losses without a slope near an image, such as of rounded
    images, are attacked by a replaced gradient (BPDA): over a larger step all must rise by most of what it says. Models that
    cannot be computed in float64 are asked in float32, along more directions, which notices errors of a third of the
    gradient's size.

    Source: finite differences as a check, Athalye et al., Obfuscated Gradients Give a False Sense of Security, 2018,
    section 3.1, where gradients that differ from those of the function are called shattered.
    """
    if all(is_black_box(outcomes.spec) for outcomes in subject.outcomes) or not subject.has_gradient():
        return
    count = IMAGES if subject.images[0].numel() <= SMALL else FEWEST
    points, noisy, directions = _draw(subject, count)
    labels = subject.labels[:count]
    size = subject.judge.batch_size
    fewest, along, by, how = FEWEST, "a random direction", f"by more than {100 * TOLERANCE:.0f} %", ""
    try:
        try:
            with exact_model(subject.judge.model) as network:
                found = _compare(_Losses(network, labels.cpu(), size), points, directions[:1])
        except Exception as error:
            # Fewer images at a time may fit.
            if is_out_of_memory(error) and size > 1:
                raise
            how = f" ({explain_no_float64(error)}: in float32)"
            fewest = max(FEWEST, math.ceil(ROUGH_SHARE * len(labels)))
            along = f"{ROUGH_DIRECTIONS} random directions"
            by = f"by more than {100 * ROUGH_TOLERANCE:.0f} % of the gradient's size"
            losses = _Losses(subject.judge.model, labels, size, is_exact=False)
            found = _compare(losses, points.to(subject.images), directions.to(subject.images.device))
    except Exception as error:
        if is_out_of_memory(error) and size > 1:
            raise
        # Whatever a network of other people does when it is cast is no failure of an attack.
        detail = f"{explain_no_float64(error)}, so whether gradients are the model's is not known."
        yield Diagnostic(name="finite_differences", passed=None, detail=detail)
        return
    passed = is_tolerable(found.differing, found.compared, TOLERATED_DIFFERING) if found.compared >= fewest else None
    detail = (
        f"Along {along} the loss of {found.differing} of {found.compared} images changes otherwise than its gradient says, "
        f"{by}{how}"
    )
    losses = _Losses(subject.judge.model, labels, size, is_exact=False)
    # Noisy, too: near black and white, rounding to few levels hides steps.
    if passed is not False and all(_falls_short(losses, near.to(subject.images)) for near in (points, noisy)):
        passed = False
        detail = (
            f"By {format_eps(STEP, 'linf')} along the sign of its gradient the loss of most images rises by less than "
            f"{100 * SHORT:.0f} % of what gradients on the way say"
        )
    if passed is False:
        detail += (
            ": attacks follow a gradient that is not the model's, or a part of it, and what they leave standing shows little"
        )
    elif passed is None:
        detail += f"; of {len(labels)} images no more have a slope to compare with, and {fewest} are needed"
        detail += ": it is left to other checks"
    yield Diagnostic(name="finite_differences", passed=passed, detail=f"{detail}.")


def _compare(losses: _Losses, points: torch.Tensor, directions: torch.Tensor) -> _Found:
    """At points (N, 3, H, W), along some directions of signs (D, N, 3, H, W)."""
    gradients = losses.gradients(points)
    promised = torch.stack([(signs.to(points) * gradients).flatten(1).double().sum(1) for signs in directions])
    slope, again = (losses.slopes(points, directions, length) for length in (LENGTHS if losses.is_exact else ROUGH_LENGTHS))
    size = scale = _size(slope)
    tolerance = TOLERANCE
    if not losses.is_exact:
        # The slope along random signs is as large, on average of its square; NaN is none.
        scale, tolerance = size.fmax(gradients.flatten(1).double().norm(dim=1)), ROUGH_TOLERANCE
    has_slope = (_size(slope - again) <= TOLERANCE * scale) & size.isfinite() & (size > 0)
    # Written so that NaN differs.
    agrees = _size(promised - slope) <= tolerance * scale
    return _Found(int((has_slope & ~agrees).sum()), int(has_slope.sum()))


def _falls_short(losses: _Losses, points: torch.Tensor) -> bool:
    """Whether losses rise by too little over a larger step, on most images where they change."""
    signs = losses.gradients(points).sign()
    rise, again = (losses.slopes(points, signs[None], STEP)[0] for _ in range(2))
    ways = [STEP * ((2 * place + 1) / PLACES - 1) for place in range(PLACES)]
    promised = sum((signs * losses.gradients(points + way * signs)).flatten(1).double().sum(1) for way in ways) / PLACES
    is_told = (promised > 0) & (rise != 0) & ((rise - again).abs() <= TOLERANCE * rise.abs())
    is_short = is_told & (rise < SHORT * promised)
    return bool(is_told.sum() >= FEWEST and is_short.sum() >= ROUGH_SHARE * is_told.sum())


def _size(slopes: torch.Tensor) -> torch.Tensor:
    """Of slopes (D, N) along D directions, (N,)."""
    return slopes.square().mean(0).sqrt()


def _draw(subject: Subject, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Points near the images and inside the box, off the grid of 8 bits, noisy ones, directions of signs.

    (count, 3, H, W), twice, float64, and (`ROUGH_DIRECTIONS`, count, 3, H, W), int8.
    """
    points, noisy, directions = [], [], []
    for image, key in zip(subject.images[:count].cpu().double(), subject.keys, strict=False):
        generator = subject.generator("finite differences", key, 0.0)
        noise = torch.rand(image.shape, generator=generator, dtype=torch.float64)
        points.append(0.02 + 0.955 * image + 0.005 * noise)
        noisy.append(0.02 + 0.48 * (image + noise))
        directions.append(2 * torch.randint(2, (ROUGH_DIRECTIONS, *image.shape), generator=generator, dtype=torch.int8) - 1)
    return torch.stack(points), torch.stack(noisy), torch.stack(directions, 1)


@dataclass(frozen=True)
class _Losses:
    """The loss of images (N, 3, H, W) under a network, `size` images at a time; in float64, or as it comes where not exact."""

    network: nn.Module
    labels: torch.Tensor
    size: int
    is_exact: bool = True

    def gradients(self, points: torch.Tensor) -> torch.Tensor:
        gradients = []
        for some, labels in zip(points.split(self.size), self.labels.split(self.size), strict=True):
            with torch.enable_grad():
                leaf = some.clone().requires_grad_()
                gradients += torch.autograd.grad(self._of(leaf, labels).sum(), leaf)
        return torch.cat(gradients)

    def slopes(self, points: torch.Tensor, directions: torch.Tensor, length: float) -> torch.Tensor:
        """By central differences, (D, N), float64."""
        differences = []
        for signs in directions:
            change = length * signs.to(points)
            differences.append(self._at(points + change) - self._at(points - change))
        return torch.stack(differences) / (2 * length)

    def _at(self, points: torch.Tensor) -> torch.Tensor:
        parts = zip(points.split(self.size), self.labels.split(self.size), strict=True)
        return torch.cat([self._of(some, labels) for some, labels in parts])

    def _of(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = self.network(images)
        if self.is_exact and logits.dtype != torch.float64:
            raise TypeError(
                f"it answers in {logits.dtype} all the same, which hides differences so small".replace("torch.", "")
            )
        return log_odds(logits, labels)
