"""Projected gradient descent over a ladder of budgets, no step spent on an image that is broken."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import nn

from lrrobust.attacks.assignment import Assignment, Claim, Passes
from lrrobust.attacks.ball import l1_direction, l2_length, project, sparse_unit, unit
from lrrobust.attacks.climb import is_misclassified
from lrrobust.attacks.losses import lead_of, log_odds, margin
from lrrobust.attacks.targets import Target, choose_targets, with_the_choice
from lrrobust.threat import Norm

#: What is climbed: "ce" the cross-entropy, "margin" the lead of the nearest other class.
PgdLoss = Literal["ce", "margin"]


@dataclass(eq=False)
class _Climb:
    """An image on its way up the ladder: where it stands, and its present iterate (None: not started there)."""

    row: int
    level: int
    #: Number of the start at this level: the restarts towards one target, then those towards the next.
    start: int = 0
    step: int = 0
    iterate: torch.Tensor | None = None
    target: int | None = None


def pgd(
    given: Assignment,
    *,
    norm: Norm,
    steps: int,
    step_size_ratio: float,
    random_start: bool,
    restarts: int,
    precision: str,
    loss: PgdLoss = "ce",
    target: Target = "none",
    targets: int = 1,
    sparsity: float = 0.01,
    warm_start: bool = False,
    ahead: bool | None = None,
) -> Passes:
    """Attack images at every budget, from the smallest up, until they are broken.

    At budget eps an image takes `steps` steps of length step_size_ratio * eps / steps along the sign
    of the gradient (linf), the gradient divided by its length (l2), or the sign of its largest values
    (l1), each followed by the projection onto the ball and onto [0, 1]. Iterates that the model
    misclassifies are claimed on the way, the last iterate of every start in any case. A broken image
    leaves the batch and is attacked at no larger budget; its place goes to the next image that waits,
    which may stand at another budget.

    The loss "ce" is log sum_{k != y} exp(z_k) - z_y. Its gradient is that of the cross-entropy divided by
    1 - p_y, which sign and length take no notice of; but it does not vanish where the label's
    probability p_y rounds to 1, as the cross-entropy does on confident models. Where logits are small, all other classes
    share in it, and it leads away from their mean; "margin", max_{k != y} z_k - z_y, leads to the nearest whatever their scale.

    With a target t "ce" is log p_t / (1 - p_t) instead, which rises as the target's probability does, and "margin" z_t - z_y.
    The target is where the search goes, not what it is asked for: an image is broken by any class but its own.

    Random starts are those of torchattacks: uniform in the linf ball; in l2 of a uniform direction and a uniform share
    of eps as length, and in l1, which it does not have, likewise. They follow from `draw` alone: which images share a batch
    changes nothing but the rounding of the model.

    Args:
        given: the images, and who judges; it draws random starts, and random targets.
        norm: "linf", "l2" or "l1".
        precision: "bf16" runs the model under autocast to bfloat16; iterates and steps stay as `images`.
        loss: "ce" or "margin", see above.
        target: "none", or which class to go to, see `lrrobust.attacks.targets`.
        targets: how many "top_k" makes `restarts` starts for each; without effect on others.
        sparsity: share of the values that a step in l1 changes; without effect in other norms.
        warm_start: begin the first restart at a larger budget where it ended at the one before, the perturbation
            stretched to the larger ball.
        ahead: fill a batch that no image waits for with the larger budgets of those in it. Where a step costs the same
            however many images it takes, as on a GPU while they are few, larger budgets then cost nothing; passes at
            budgets above the one that breaks an image are lost. By default on a GPU, but for warm starts, which cannot.

    Returns:
        Forward and backward passes by budget and image, int64 (len(ladder), N): one each a gradient step, and a
        forward pass to choose targets.

    Raises:
        ConfigError: there is no such target.

    Source: Madry et al., Towards Deep Learning Models Resistant to Adversarial Attacks, 2018, section 2.1; l1: Tramer
    and Boneh, Adversarial Training and Robustness for Multiple Perturbations, 2019, section 2.2; targets: Kurakin et
    al., Adversarial Machine Learning at Scale, 2017, section 3; margin: Carlini and Wagner, Towards Evaluating the
    Robustness of Neural Networks, 2017, section V.A, objective f6, climbed by PGD in Madry et al., table 2.
    """
    attacked = torch.where(given.levels > _first_level(given.ladder), given.levels, 0)
    classes = None if target == "none" else choose_targets(replace(given, levels=attacked), target, targets)
    ascent = _Ascent(
        given,
        norm,
        classes=classes,
        target=target,
        restarts=restarts,
        starts=restarts * (classes.shape[1] if target == "top_k" else 1),
        steps=steps,
        step_size_ratio=step_size_ratio,
        loss=loss,
        precision=precision,
        sparsity=sparsity,
        random_start=random_start,
        warm_start=warm_start,
        ahead=_is_ahead(ahead, given.images.device, warm_start),
    )
    while ascent.goes_on():
        ascent.fill()
        if ascent.is_time_to_judge():
            ascent.judge()
        else:
            ascent.step()
    return ascent.passes if classes is None else with_the_choice(ascent.passes), ascent.passes


def _first_level(ladder: Sequence[float]) -> int:
    """Of the smallest budget at which anything is attacked."""
    return next((level for level, eps in enumerate(ladder) if eps > 0), len(ladder))


class _Ascent:
    """All images on their way up the ladder: who waits, who is in the batch, and what is to be judged.

    Args:
        classes: (N, T) int64, where each image may be driven to; None without a target.
        starts: of an image at one budget: the restarts towards one target, then those towards the next.

    Attributes:
        passes: by budget and image, int64 (L, N).
    """

    def __init__(
        self,
        given: Assignment,
        norm: Norm,
        *,
        classes: torch.Tensor | None,
        target: Target,
        restarts: int,
        starts: int,
        steps: int,
        step_size_ratio: float,
        loss: PgdLoss,
        precision: str,
        sparsity: float,
        random_start: bool,
        warm_start: bool,
        ahead: bool,
    ) -> None:
        self._given, self._norm, self._classes, self._target = given, norm, classes, target
        self._restarts, self._starts, self._steps, self._step_size_ratio = restarts, starts, steps, step_size_ratio
        self._loss, self._precision, self._sparsity = loss, precision, sparsity
        self._random_start, self._warm_start, self._ahead = random_start, warm_start, ahead
        self.passes = torch.zeros(len(given.ladder), len(given.images), dtype=torch.int64)
        first = _first_level(given.ladder)
        #: By row, the next level to begin with, and the first at which the image is not attacked any more.
        self._following, self._stop = [first + 1] * len(given.images), given.levels.tolist()
        self._waiting = deque(_Climb(row, first) for row, stop in enumerate(self._stop) if first < stop)
        self._active: list[_Climb] = []
        self._claims: list[_Claimed] = []
        #: Perturbations at the budget before, in units of it, by row and number of the start.
        self._ended: dict[tuple[int, int], torch.Tensor] = {}

    def goes_on(self) -> bool:
        return bool(self._waiting or self._active or self._claims)

    def fill(self) -> None:
        """Gives free places of the batch to those who wait, and on a GPU to larger budgets of those in it."""
        while self._waiting and not self._is_full():
            self._active.append(self._begin(self._waiting.popleft()))
        while self._ahead and not self._is_full() and (climb := self._one_ahead()) is not None:
            self._active.append(self._begin(climb))

    def is_time_to_judge(self) -> bool:
        """Claims are judged together: when they fill a batch, or the batch needs who comes back from them."""
        if len(self._claims) >= self._given.batch_size:
            return True
        # Few come back but those whose start came to its end.
        is_short = not self._is_full() and (not self._active or any(is_last for *_, is_last in self._claims))
        return bool(self._claims) and is_short

    def judge(self) -> None:
        """Has the first claims judged; who is not broken goes on, and who is leaves all larger budgets."""
        judged, self._claims = _take(self._claims, self._given.batch_size)
        unbroken, broken = _judge(judged, self._given.ladder, self._given.claim)
        for climb in broken:
            self._stop[climb.row] = min(self._stop[climb.row], climb.level)
        if self._ahead and broken:
            self._active = [climb for climb in self._active if self._is_wanted(climb)]
            self._waiting = deque(climb for climb in self._waiting if self._is_wanted(climb))
            self._claims = [claimed for claimed in self._claims if self._is_wanted(claimed[0])]
            unbroken = [(climb, is_last) for climb, is_last in unbroken if self._is_wanted(climb)]
        for climb, is_last in unbroken:
            if not is_last and climb.step == self._steps:
                self._claims.append((climb, climb.iterate, True))
            elif not is_last or self._moves_on(climb):
                self._waiting.append(climb)

    def step(self) -> None:
        """One gradient step of the batch; what the model misclassifies is to be judged, and the last of every start."""
        given, active = self._given, self._active
        rows = torch.tensor([climb.row for climb in active], device=given.images.device)
        budgets = [given.ladder[climb.level] for climb in active]
        eps = given.images.new_tensor(budgets)[:, None, None, None]
        lengths = [self._step_size_ratio * budget / self._steps for budget in budgets]
        length = given.images.new_tensor(lengths)[:, None, None, None]
        iterates = torch.stack([climb.iterate for climb in active])
        labels = given.labels[rows]
        aims = None if self._classes is None else torch.tensor([climb.target for climb in active], device=rows.device)
        logits, gradient = _evaluate(given.model, iterates, labels, aims, self._loss, self._precision)
        is_sparse = self._norm == "l1"
        direction = sparse_unit(gradient, iterates, self._sparsity) if is_sparse else unit(gradient, self._norm)
        stepped = project(given.images[rows], iterates + length * direction, eps, self._norm)
        is_candidate = is_misclassified(logits, labels)
        self._active = []
        for climb, now, then, is_claimed in zip(active, iterates, stepped, is_candidate.tolist(), strict=True):
            self.passes[climb.level, climb.row] += 1
            climb.step += 1
            climb.iterate = then
            if is_claimed:
                self._claims.append((climb, now, False))
            elif climb.step == self._steps:
                self._claims.append((climb, then, True))
            else:
                self._active.append(climb)

    def _is_full(self) -> bool:
        return len(self._active) >= self._given.batch_size

    def _is_wanted(self, climb: _Climb) -> bool:
        return climb.level < self._stop[climb.row]

    def _begin(self, climb: _Climb) -> _Climb:
        """Gives an image that has none a first iterate and, where one is wanted, a target."""
        if climb.iterate is not None:
            return climb
        image, eps = self._given.images[climb.row], self._given.ladder[climb.level]
        generator = self._given.draw(climb.row, eps, climb.start)
        if self._classes is not None:
            climb.target = _choose_one(self._classes[climb.row], self._target, climb.start // self._restarts, generator)
        before = self._ended.pop((climb.row, climb.start), None)
        climb.step = 0
        if before is not None:
            ball = image.new_full((1, 1, 1, 1), eps)
            climb.iterate = project(image[None], (image + eps * before)[None], ball, self._norm)[0]
        else:
            climb.iterate = _start(image, self._norm, eps, generator) if self._random_start else image
        return climb

    def _moves_on(self, climb: _Climb) -> bool:
        """Moves an image whose start came to its end to the next start or budget; False when there is none."""
        if self._warm_start and climb.start % self._restarts == 0:
            delta = climb.iterate - self._given.images[climb.row]
            self._ended[climb.row, climb.start] = delta / self._given.ladder[climb.level]
        climb.iterate = None
        climb.start += 1
        if climb.start == self._starts:
            climb.start = 0
            climb.level = self._following[climb.row]
            self._following[climb.row] += 1
        return self._is_wanted(climb)

    def _one_ahead(self) -> _Climb | None:
        """The smallest budget that is not begun of an image that is attacked."""
        rows = {climb.row for climb in self._active if self._following[climb.row] < self._stop[climb.row]}
        if not rows:
            return None
        row = min(rows, key=lambda row: (self._following[row], row))
        self._following[row] += 1
        return _Climb(row, self._following[row] - 1)


def _is_ahead(asked: bool | None, device: torch.device, warm_start: bool) -> bool:
    """Whether to attack larger budgets before smaller ones are done; a warm start begins where those ended."""
    return (device.type == "cuda" if asked is None else asked) and not warm_start


def _choose_one(classes: torch.Tensor, target: Target, number: int, generator: torch.Generator) -> int:
    """The class that one start goes to, of those (T,) chosen for its image."""
    if target == "random":
        number = int(torch.randint(len(classes), (), generator=generator))
    return int(classes[number])


def _start(image: torch.Tensor, norm: Norm, eps: float, generator: torch.Generator) -> torch.Tensor:
    """A random image (C, H, W) of ball and box. Drawn on the CPU in float32: the same on every device."""
    if norm == "linf":
        noise = (2 * torch.rand(image.shape, generator=generator) - 1) * eps
    elif norm == "l2":
        direction = torch.randn(image.shape, generator=generator)
        noise = direction * (torch.rand((), generator=generator) * eps / l2_length(direction, (0, 1, 2))).to(direction)
    else:
        noise = l1_direction(image.shape, generator) * (torch.rand((), generator=generator) * eps)
    return (image + noise.to(image)).clamp(0, 1)


#: An image, what is proposed for it, and whether that is the last of its start.
_Claimed = tuple[_Climb, torch.Tensor, bool]


def _take(claims: Sequence[_Claimed], count: int) -> tuple[list[_Claimed], list[_Claimed]]:
    """The first claims, of every image one at most, and all others."""
    taken: dict[int, _Claimed] = {}
    left = []
    for claimed in claims:
        if len(taken) < count and claimed[0].row not in taken:
            taken[claimed[0].row] = claimed
        else:
            left.append(claimed)
    return list(taken.values()), left


def _judge(claims: Sequence[_Claimed], ladder: Sequence[float], claim: Claim) -> tuple[list[tuple[_Climb, bool]], list[_Climb]]:
    """Has the claims judged; those that broke nothing, with whether they were the last of their start, and the others."""
    climbs, proposals, is_last = zip(*claims, strict=True)
    is_broken = claim(
        [climb.row for climb in climbs],
        torch.stack(proposals),
        [ladder[climb.level] for climb in climbs],
        is_last,
    )
    unbroken = [(climb, last) for climb, last, broken in zip(climbs, is_last, is_broken, strict=True) if not broken]
    return unbroken, [climb for climb, broken in zip(climbs, is_broken, strict=True) if broken]


def _evaluate(
    model: nn.Module, iterates: torch.Tensor, labels: torch.Tensor, aims: torch.Tensor | None, loss: PgdLoss, precision: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """One forward and backward: logits (n, K) and the gradient of the loss by the iterates."""
    iterates = iterates.detach().requires_grad_()
    with torch.autocast(iterates.device.type, torch.bfloat16, enabled=precision == "bf16"):
        logits = model(iterates)
    if loss == "ce":
        losses = log_odds(logits, labels) if aims is None else -log_odds(logits, aims)
    else:
        losses = margin(logits, labels) if aims is None else lead_of(logits, aims, labels)
    (gradient,) = torch.autograd.grad(losses.sum(), iterates)
    return logits.detach(), gradient
