"""Projected gradient descent over a ladder of budgets, no step spent on an image that is broken."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from lrrobust.attacks.ball import l1_direction, l2_length, project, sparse_unit, unit
from lrrobust.attacks.losses import lead_of, log_odds, margin
from lrrobust.attacks.targets import Target, choose_targets, with_the_choice
from lrrobust.threat import Norm

#: What is climbed: "ce" the cross-entropy, "margin" the lead of the nearest other class.
PgdLoss = Literal["ce", "margin"]

#: Told of proposals: their rows among the attacked images, the proposals (M, C, H, W), the budget of each,
#: and whether each is the last of its start. Says which images are broken within these budgets, and for good.
Claim = Callable[[Sequence[int], torch.Tensor, Sequence[float], Sequence[bool]], Sequence[bool]]

#: Random numbers for one start: row among the attacked images, budget, restart -> a generator on the CPU.
Draw = Callable[[int, float, int], torch.Generator]


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
    model: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    *,
    norm: Norm,
    ladder: Sequence[float],
    levels: torch.Tensor,
    steps: int,
    step_size_ratio: float,
    random_start: bool,
    restarts: int,
    precision: str,
    batch_size: int,
    claim: Claim,
    draw: Draw,
    loss: PgdLoss = "ce",
    target: Target = "none",
    targets: int = 1,
    sparsity: float = 0.01,
    warm_start: bool = False,
    ahead: bool | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
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

    With a target t "ce" is log p_t / (1 - p_t) instead, which rises as the target's probability does, and "margin" z_t - z_y. The
    target is where the search goes, not what it is asked for: an image is broken by any class but its own.

    Random starts are those of torchattacks: uniform in the linf ball; in l2 of a uniform direction and a uniform share
    of eps as length, and in l1, which it does not have, likewise. They follow from `draw` alone: which images share a batch changes
    nothing but the rounding of the model.

    Args:
        model: images to logits (n, K), K >= 2, in evaluation mode.
        images: (N, C, H, W) in [0, 1], float32 or float64.
        labels: (N,) int64, the classes to leave.
        norm: "linf", "l2" or "l1".
        ladder: budgets in pixel units of [0, 1], ascending. Nothing is claimed at a budget of 0.
        levels: (N,) int64, how many budgets of the ladder, from the smallest, each image is attacked at.
        precision: "bf16" runs the model under autocast to bfloat16; iterates and steps stay as `images`.
        batch_size: images passed through the model at once.
        claim: judges; may be asked about any number of images up to `batch_size` at once, each once.
        draw: for random starts, and random targets.
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
    passes = torch.zeros(len(ladder), len(images), dtype=torch.int64)
    first = next((level for level, eps in enumerate(ladder) if eps > 0), len(ladder))
    classes = None
    if target != "none":
        attacked = torch.where(levels > first, levels, 0)
        classes = choose_targets(model, images, labels, attacked, target, targets, batch_size)
    starts = restarts * (classes.shape[1] if target == "top_k" else 1)
    ahead = _is_ahead(ahead, images.device, warm_start)
    #: By row, the next level to begin with, and the first at which the image is not attacked any more.
    following, stop = [first + 1] * len(images), levels.tolist()
    #: Perturbations at the budget before, in units of it, by row and number of the start.
    ended: dict[tuple[int, int], torch.Tensor] = {}

    def begin(climb: _Climb) -> _Climb:
        """Gives an image that has none a first iterate and, where one is wanted, a target."""
        if climb.iterate is None:
            image, eps = images[climb.row], ladder[climb.level]
            generator = draw(climb.row, eps, climb.start)
            if classes is not None:
                climb.target = _choose_one(classes[climb.row], target, climb.start // restarts, generator)
            before = ended.pop((climb.row, climb.start), None)
            climb.step = 0
            if before is not None:
                ball = images.new_full((1, 1, 1, 1), eps)
                climb.iterate = project(image[None], (image + eps * before)[None], ball, norm)[0]
            else:
                climb.iterate = _start(image, norm, eps, generator) if random_start else image
        return climb

    def goes_on(climb: _Climb) -> bool:
        """Moves an image to its next start or budget; False when there is none."""
        climb.iterate = None
        climb.start += 1
        if climb.start == starts:
            climb.start = 0
            climb.level = following[climb.row]
            following[climb.row] += 1
        return climb.level < stop[climb.row]

    def one_ahead() -> _Climb | None:
        """The smallest budget that is not begun of an image that is attacked."""
        rows = {climb.row for climb in active if following[climb.row] < stop[climb.row]}
        if not rows:
            return None
        row = min(rows, key=lambda row: (following[row], row))
        following[row] += 1
        return _Climb(row, following[row] - 1)

    waiting = deque(_Climb(row, first) for row in range(len(images)) if first < stop[row])
    active: list[_Climb] = []
    claims: list[_Claimed] = []
    while waiting or active or claims:
        while waiting and len(active) < batch_size:
            active.append(begin(waiting.popleft()))
        while ahead and len(active) < batch_size and (climb := one_ahead()) is not None:
            active.append(begin(climb))
        # Claims are judged together: when they fill a batch, or the batch needs who comes back from them.
        # Few do but those whose start came to its end.
        is_short = len(active) < batch_size and (not active or any(is_last for *_, is_last in claims))
        if len(claims) >= batch_size or (claims and is_short):
            judged, claims = _take(claims, batch_size)
            unbroken, broken = _judge(judged, ladder, claim)
            for climb in broken:
                stop[climb.row] = min(stop[climb.row], climb.level)
            if ahead and broken:
                active = [climb for climb in active if climb.level < stop[climb.row]]
                waiting = deque(climb for climb in waiting if climb.level < stop[climb.row])
                claims = [claimed for claimed in claims if claimed[0].level < stop[claimed[0].row]]
                unbroken = [(climb, is_last) for climb, is_last in unbroken if climb.level < stop[climb.row]]
            for climb, is_last in unbroken:
                if not is_last and climb.step == steps:
                    claims.append((climb, climb.iterate, True))
                elif not is_last:
                    waiting.append(climb)
                else:
                    if warm_start and climb.start % restarts == 0:
                        ended[climb.row, climb.start] = (climb.iterate - images[climb.row]) / ladder[climb.level]
                    if goes_on(climb):
                        waiting.append(climb)
            continue
        rows = torch.tensor([climb.row for climb in active], device=images.device)
        budgets = [ladder[climb.level] for climb in active]
        eps = images.new_tensor(budgets)[:, None, None, None]
        length = images.new_tensor([step_size_ratio * budget / steps for budget in budgets])[:, None, None, None]
        iterates = torch.stack([climb.iterate for climb in active])
        aims = None if classes is None else torch.tensor([climb.target for climb in active], device=images.device)
        logits, gradient = _evaluate(model, iterates, labels[rows], aims, loss, precision)
        direction = sparse_unit(gradient, iterates, sparsity) if norm == "l1" else unit(gradient, norm)
        stepped = project(images[rows], iterates + length * direction, eps, norm)
        is_candidate = (logits.argmax(1) != labels[rows]) & logits.isfinite().all(1)
        still = []
        for climb, now, then, is_claimed in zip(active, iterates, stepped, is_candidate.tolist(), strict=True):
            passes[climb.level, climb.row] += 1
            climb.step += 1
            climb.iterate = then
            if is_claimed:
                claims.append((climb, now, False))
            elif climb.step == steps:
                claims.append((climb, then, True))
            else:
                still.append(climb)
        active = still
    return passes if classes is None else with_the_choice(passes), passes


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


def _judge(
    claims: Sequence[_Claimed], ladder: Sequence[float], claim: Claim
) -> tuple[list[tuple[_Climb, bool]], list[_Climb]]:
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
