"""Does what attacks climb come down step by step, and to nothing where the class changes?"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from lrrobust.diagnostics.numerics import is_deterministic
from lrrobust.diagnostics.outcomes import is_black_box
from lrrobust.diagnostics.records import Diagnostic
from lrrobust.diagnostics.subject import Subject

#: Images of the sample that are blended, and how many it takes: a model jumps for all, or nearly.
IMAGES, FEWEST = 24, 8

#: Of the way from an image to another one: what is left at the boundary moves no value by more than 2e-5.
HALVINGS = 16

#: Share of the clean margin by which it may fall there, at the median image. It is 5e-4 at most on the trained networks,
#: 0.05 in bfloat16, 0.08 behind rounding to 8 levels, 0.17 behind JPEG; 0.6 to 2.5 where images are moved by 2/255 or more.
TOLERATED_JUMP = 0.35

#: The same for a large fall on the way there: 0.9 behind the logarithm of votes, where the first one lost costs most, 0.7 where
#: one of several networks is chosen; 0.25 at most behind JPEG and rounding to 8 levels.
TOLERATED_FALL = 0.5


@torch.no_grad()
def check_jumps(subject: Subject) -> Iterator[Diagnostic]:
    """Whether the margin of an image that is blended into one of another class falls in small steps, and to zero.

    A model that moves an image away from the boundary before it classifies it, such as by gradient steps towards the class that
    it first takes it for, changes its answer where it did before, and is as sure on either side. So is one whose networks vote.
    Attacks that climb logits then see nothing of the boundary before they are beyond it. Those that need no more than the class
    have no result.

    Source: steps towards the class first predicted, Alfarra et al., Combating Adversaries with Anti-Adversaries, 2022; how
    little such models withstand, Croce et al., Evaluating the Adversarial Robustness of Adaptive Test-time Defenses, 2022.
    """
    if not any(outcomes.spec.needs_logits or not is_black_box(outcomes.spec) for outcomes in subject.outcomes):
        return
    if not is_deterministic(subject):
        detail = "The model is randomised, so that margins differ in any case: whether they jump is not known."
        yield Diagnostic(name="jumps", passed=None, detail=detail)
        return
    jumps, falls = _jumps(subject)
    jump, fall = (float(np.median(each)) if len(each) else 0.0 for each in (jumps, falls))
    detail = (
        f"Where blends of {len(jumps)} pairs of images change class, the margin falls at once by {100 * jump:.1f} % of the "
        f"clean one, at the median, and on the way there by up to {100 * fall:.1f} %"
    )
    passed: bool | None = None
    if len(jumps) < FEWEST:
        detail += f"; {FEWEST} pairs of different classes are needed to say more"
    # Written so that NaN fails.
    elif not (passed := jump <= TOLERATED_JUMP and fall <= TOLERATED_FALL):
        detail += (
            ": logits tell attacks nothing of the boundary before they are beyond it, as where images are purified or networks "
            "vote, and what is left standing shows little. hop_skip_jump needs the class alone; --surrogate attacks the "
            "network behind, or the mean of those that vote"
        )
    yield Diagnostic(name="jumps", passed=passed, detail=f"{detail}.")


def _jumps(subject: Subject) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Fall of the margin at the boundary, and a large one before it, as shares of the clean margin.

    One for each image that has a partner; float64.
    """
    count = min(IMAGES, len(subject))
    # Twice as many: where classes are uneven the sample may hold a single one.
    total = len(subject.outcomes[0].breaking_eps)
    partners, their_labels, _ = subject.load(range(min(total, 2 * count)))
    pairs = [
        (place, int(other[0]))
        for place, label in enumerate(subject.labels[:count])
        if len(other := (their_labels != label).nonzero().flatten().roll(-place))
    ]
    if not pairs:
        return np.zeros(0), np.zeros(0)
    places, others = torch.tensor(pairs, device=subject.labels.device).unbind(1)
    images, labels, way = subject.images[places], subject.labels[places], partners[others] - subject.images[places]
    keys = [subject.keys[place] for place in places.tolist()]

    def margin(share: torch.Tensor) -> torch.Tensor:
        return subject.judge.predict((images + share[:, None, None, None] * way).clamp(0, 1), labels, keys).margin

    clean = margin(images.new_zeros(len(images)))

    def narrow(end: torch.Tensor, after: torch.Tensor, *, is_edge: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Halves the way to `end`, to the boundary or where the margin falls most: the beginning of the rest, margin, fall."""
        start, before = torch.zeros_like(end), clean
        for _ in range(HALVINGS):
            middle = (start + end) / 2
            found = margin(middle)
            is_first = found < 0 if is_edge else before - found > found - after
            start, end = torch.where(is_first, start, middle), torch.where(is_first, middle, end)
            before, after = torch.where(is_first, before, found), torch.where(is_first, found, after)
        return start, before, before - after

    whole = images.new_ones(len(images))
    inside, last, jump = narrow(whole, margin(whole), is_edge=True)
    fall = narrow(inside, last, is_edge=False)[2]
    scale = clean.clamp_min(torch.finfo(torch.float32).tiny)
    return (jump / scale).cpu().numpy(), (fall / scale).cpu().numpy()
