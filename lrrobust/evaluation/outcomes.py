"""What is known of a chunk's images while an attack runs, and of those that were attacked before."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pyarrow as pa
import torch

from lrrobust.attacks.specs import AttackSpec
from lrrobust.evaluation.judge import Judgement, Prediction
from lrrobust.evaluation.tasks import Task
from lrrobust.threat import NORMS, ThreatModel


class Outcomes:
    """What is known of a chunk's N images under one attack with L budgets; all tensors on the device.

    `nearest` (N, 3, H, W) is the nearest verified adversarial image, the clean one where there is none;
    `prediction`, `margin` and, by norm, `distances` (N,) are its own, infinity where there is none. From budget `breaks_at`
    (N,) on some verified adversarial image counts. `last_...` and `is_rejected` (L, N) tell of the last proposal at each
    budget, of the clean image where there was none. Of adversarial images rounded to 8 bits, `quantized` is the nearest
    verified one, float64 `quantized_at` the budget from which on it counts, infinity where there is none, and
    `quantized_prediction` its own.
    """

    def __init__(self, images: torch.Tensor, clean: Prediction, labels: torch.Tensor, levels: int) -> None:
        self.nearest = images.clone()
        self.is_clean_correct = clean.label == labels
        self.prediction, self.margin = clean.label.clone(), clean.margin.clone()
        self.breaks_at = torch.full_like(clean.margin, math.inf)
        self.distances = {norm: torch.full_like(clean.margin, math.inf) for norm in NORMS}
        self.last_prediction, self.last_margin = clean.label.repeat(levels, 1), clean.margin.repeat(levels, 1)
        self.is_rejected = torch.zeros_like(self.last_prediction, dtype=torch.bool)
        self.quantized: torch.Tensor | None = None
        self.quantized_prediction = clean.label.clone()
        self.quantized_at = torch.full_like(clean.margin, math.inf)

    @property
    def is_broken(self) -> torch.Tensor:
        """Of which images there is a verified adversarial one, bool (N,)."""
        return self.breaks_at.isfinite()

    def enter(self, rows: torch.Tensor, proposed: torch.Tensor, verdict: Judgement, threat: ThreatModel) -> torch.Tensor:
        """Keeps the nearest adversarial image of each row; which rows are broken within their eps by now, bool (M,)."""
        found = verdict.distances[threat.norm]
        is_nearer = verdict.is_adversarial & (found < self.distances[threat.norm][rows])
        better = rows[is_nearer]
        self.nearest[better] = proposed[is_nearer].detach().to(self.nearest)
        self.prediction[better] = verdict.prediction.label[is_nearer]
        self.margin[better] = verdict.prediction.margin[is_nearer]
        for norm in NORMS:
            self.distances[norm][better] = verdict.distances[norm][is_nearer]
        # Of every proposal, not of the nearest alone: its distance may exceed its eps by the tolerance of the ball, and one
        # of a larger eps be nearer by less than that.
        eps = torch.as_tensor(threat.eps).to(found).expand_as(found)
        reached = torch.where(verdict.is_adversarial, torch.minimum(found, eps), math.inf)
        self.breaks_at[rows] = torch.minimum(self.breaks_at[rows], reached)
        return self.is_broken[rows] & (self.breaks_at[rows] <= eps)

    def enter_quantized(self, rows: torch.Tensor, rounded: torch.Tensor, verdict: Judgement, threat: ThreatModel) -> None:
        """Keeps the nearest adversarial image of 8 bits of each row."""
        reached = verdict.distances[threat.norm].minimum(torch.as_tensor(threat.eps).to(self.quantized_at))
        is_nearer = verdict.is_adversarial & (reached < self.quantized_at[rows])
        better = rows[is_nearer]
        if self.quantized is None:
            self.quantized = self.nearest.clone()
        self.quantized[better] = rounded[is_nearer].to(self.quantized)
        self.quantized_at[better] = reached[is_nearer]
        self.quantized_prediction[better] = verdict.prediction.label[is_nearer]

    def enter_last(self, levels: torch.Tensor, rows: torch.Tensor, verdict: Judgement, is_last: torch.Tensor) -> None:
        """Keeps what became of those proposals that were the last of their start."""
        at = levels[is_last], rows[is_last]
        self.last_prediction[at] = verdict.prediction.label[is_last]
        self.last_margin[at] = verdict.prediction.margin[is_last]
        self.is_rejected[at] = verdict.is_rejected[is_last]


@dataclass(frozen=True)
class AtEps:
    """What an attack left at one eps: its cost, and what it last proposed for images still standing."""

    eps: float
    wall_s: torch.Tensor
    forwarded: torch.Tensor
    backwarded: torch.Tensor
    prediction: torch.Tensor
    margin: torch.Tensor
    is_rejected: torch.Tensor


class BrokenAt:
    """The distances at which the attacks of a run, so far, broke the N images of a chunk, by norm."""

    def __init__(self, n: int) -> None:
        self._distances = {norm: torch.full((n,), math.inf, dtype=torch.float64) for norm in NORMS}

    def enter(self, task: Task, rows: pa.Table, in_8_bits: bool) -> None:
        """Takes in the rows of a task of this chunk; they hold all images at one eps, then at the next.

        Where 8 bits are asked for, an image is broken when it is broken so.
        """
        known = self._distances[task.spec.norm]
        distance = torch.tensor(rows[f"{task.spec.norm}_distance"].fill_null(math.inf).to_numpy())
        # A distance may exceed the eps it was accepted at by the tolerance of the ball.
        reached = torch.minimum(distance, torch.tensor(rows["eps"].to_numpy()))
        is_known = distance.isfinite()
        if in_8_bits:
            # Of the rounded image the rows do not have the distance, but from which eps on it counts.
            is_known = torch.tensor(rows["is_broken_quantized"].fill_null(False).to_pylist())
            reached = torch.tensor(rows["eps"].to_numpy())
        nearest = reached.where(is_known, math.inf).view(-1, len(known)).amin(0)
        torch.minimum(known, nearest, out=known)

    def of(self, spec: AttackSpec) -> torch.Tensor:
        """Distances (N,) that count for an attack: infinity throughout where it goes on regardless."""
        known = self._distances[spec.norm]
        return known.clone() if spec.survivors_only else torch.full_like(known, math.inf)
