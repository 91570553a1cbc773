"""One attack on one chunk: it proposes, the judge decides, and what became of every image is kept."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from lrrobust.attacks.build import Attack, Effort
from lrrobust.attacks.specs import AttackSpec
from lrrobust.determinism import seeded
from lrrobust.evaluation.chunk_images import ChunkImages
from lrrobust.evaluation.chunks import Chunk, chunk_seed, start_seed
from lrrobust.evaluation.judge import Judge, Judgement, Prediction, call_model
from lrrobust.evaluation.outcomes import AtEps, BrokenAt, Outcomes
from lrrobust.evaluation.quantization import quantize
from lrrobust.evaluation.rows import make_rows
from lrrobust.evaluation.tasks import Task
from lrrobust.threat import ThreatModel

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Surrogate:
    """The model that the attacks see in the stead of the one that judges.

    Args:
        model: images (N, 3, H, W) in [0, 1], as the judging model takes them -> logits (N, num_classes), on its device.
        num_classes: width of the logits.
        labels: true class of each evaluated image among the surrogate's classes, by position.
    """

    model: nn.Module
    num_classes: int
    labels: Sequence[int]


@dataclass(frozen=True)
class RunSettings:
    """What all tasks of a run share."""

    judge: Judge
    fingerprint: str
    on_forward: Callable[[int], None]
    on_begin: Callable[[Task, float], None]
    surrogate: Surrogate | None = None
    real_pixels: Literal["judged", "saved"] | None = None


def attack_chunk(
    run: RunSettings, batch: ChunkImages, clean: Prediction, task: Task, broken_at: BrokenAt
) -> tuple[Outcomes, list[dict[str, Any]], dict[str, str]]:
    """What one task did to its images, their rows, all eps ascending, and what the results must say of the attack."""
    spec = task.spec
    attack = Attack(spec)
    outcomes = Outcomes(batch.images, clean, batch.labels, len(attack.ladder))
    wall_s = torch.zeros(outcomes.is_rejected.shape, dtype=torch.float64)
    forwarded, backwarded = torch.zeros(2, *outcomes.is_rejected.shape, dtype=torch.int64)
    # How many budgets, from the smallest, an image is attacked at: not those at which it is broken already.
    earlier = broken_at.of(spec)
    levels = (torch.tensor(spec.eps, dtype=torch.float64)[:, None] < earlier).sum(0)
    if spec.minimises:
        levels = (levels > 0).long()
    rows = outcomes.is_clean_correct.nonzero().squeeze(1)
    run.on_begin(task, levels[rows.cpu()].sum().item() / (len(attack.ladder) * len(levels)))
    met = {}
    if len(rows):
        started = time.perf_counter()
        with seeded(batch.images.device, chunk_seed(run.fingerprint, spec.name, task.chunk.start)):
            effort = _run_attack(run, attack, spec, batch, outcomes, rows, levels[rows.cpu()], task.chunk)
        passes = effort.forward_passes
        forwarded[:, rows.cpu()], backwarded[:, rows.cpu()] = passes, effort.backward_passes
        # An image's share of the time is its share of the passes.
        wall_s[:, rows.cpu()] = (time.perf_counter() - started) * passes.double() / passes.sum().clamp_min(1)
        if effort.nonfinite_gradients:
            _log.warning(
                "%s met %d gradients with NaN or infinity: it was not at full strength", spec.name, effort.nonfinite_gradients
            )
            met = {"nonfinite_gradients": "yes: the attack was not at full strength"}
    ladder = [
        AtEps(*at_eps)
        for at_eps in zip(
            attack.ladder,
            wall_s,
            forwarded,
            backwarded,
            outcomes.last_prediction,
            outcomes.last_margin,
            outcomes.is_rejected,
            strict=True,
        )
    ]
    if attack.ladder == (math.inf,):
        # A minimal-norm attack runs once, without a budget; its distances are read off at every eps.
        (unbounded,) = ladder
        nothing = torch.zeros_like(forwarded[0])
        free = replace(unbounded, wall_s=nothing.double(), forwarded=nothing, backwarded=nothing)
        ladder = [*(replace(free, eps=eps) for eps in spec.eps), unbounded]
    return outcomes, make_rows(batch, clean, outcomes, task, ladder, earlier, run.real_pixels is not None), met


def _run_attack(
    run: RunSettings,
    attack: Attack,
    spec: AttackSpec,
    batch: ChunkImages,
    outcomes: Outcomes,
    rows: torch.Tensor,
    levels: torch.Tensor,
    chunk: Chunk,
) -> Effort:
    """Attacks some rows of a chunk, each at `levels` budgets; what the attack claims is judged and entered."""
    images, labels = batch.images[rows], batch.labels[rows]
    attacked_labels = labels
    if run.surrogate is not None:
        attacked_labels = torch.tensor(run.surrogate.labels[chunk.start : chunk.stop], device=labels.device)[rows]
    keys = [batch.keys[row] for row in rows.tolist()]
    device = images.device

    def claim(claimed: Sequence[int], proposed: torch.Tensor, eps: Sequence[float], is_last: Sequence[bool]) -> list[bool]:
        at = torch.tensor(claimed, device=device)
        threat = ThreatModel(spec.norm, torch.tensor(eps, dtype=torch.float64, device=device))
        # The chunk's own images: the attack's may have been changed in place by what it attacks.
        verdict = run.judge.judge(batch.images[rows[at]], labels[at], proposed, threat, [keys[row] for row in claimed])
        levels = torch.tensor([attack.ladder.index(each) for each in eps], device=device)
        outcomes.enter_last(levels, rows[at], verdict, torch.tensor(is_last, device=device))
        is_broken = outcomes.enter(rows[at], proposed, verdict, threat)
        if run.real_pixels is not None:
            is_broken = _round_and_judge(run, batch, outcomes, rows[at], proposed, verdict, threat)
        return is_broken.tolist()

    def draw(row: int, eps: float, restart: int) -> torch.Generator:
        return torch.Generator().manual_seed(start_seed(run.fingerprint, spec.name, keys[row], eps, restart))

    return attack(
        _Watched(run), images, attacked_labels, batch_size=run.judge.batch_size, claim=claim, draw=draw, levels=levels
    )


def _round_and_judge(
    run: RunSettings,
    batch: ChunkImages,
    outcomes: Outcomes,
    rows: torch.Tensor,
    proposed: torch.Tensor,
    verdict: Judgement,
    threat: ThreatModel,
) -> torch.Tensor:
    """Judges what was found adversarial once more in 8 bits; which of `rows` are broken so within their eps, bool (M,)."""
    found = verdict.is_adversarial.nonzero().squeeze(1)
    images, budgets = batch.images[rows[found]], ThreatModel(threat.norm, threat.eps[found])
    rounded = quantize(images, proposed[found], budgets)
    # Most small perturbations round to nothing: the clean image needs no second look.
    is_moved = (rounded != images).flatten(1).any(1)
    if is_moved.any():
        rounded, at = rounded[is_moved], rows[found[is_moved]]
        budgets = ThreatModel(threat.norm, budgets.eps[is_moved])
        judged = run.judge.judge(batch.images[at], batch.labels[at], rounded, budgets, [batch.keys[row] for row in at.tolist()])
        # Held in 8 bits it is an adversarial image like any other.
        outcomes.enter(at, rounded, judged, budgets)
        outcomes.enter_quantized(at, rounded, judged, budgets)
    reached = outcomes.quantized_at[rows]
    return reached.isfinite() & (reached <= threat.eps.to(reached))


class _Watched(nn.Module):
    """The model that an attack is given: its failures are one line, and its forwards are told."""

    def __init__(self, run: RunSettings) -> None:
        super().__init__()
        self.model = run.judge.model if run.surrogate is None else run.surrogate.model
        self._on_forward = run.on_forward

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits = call_model(self.model, images)
        self._on_forward(len(images))
        return logits
