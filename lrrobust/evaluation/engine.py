"""From images to rows: every attack on every chunk, judged, stored as it is finished."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from lrrobust.attacks.build import build_attack
from lrrobust.attacks.specs import AttackSpec
from lrrobust.errors import ModelError
from lrrobust.evaluation.chunks import Chunk, chunk_seed, plan_chunks
from lrrobust.evaluation.judge import Judge, Prediction, Witness, check_logits, frozen
from lrrobust.results import RunStore, rows_to_table
from lrrobust.threat import ThreatModel

_log = logging.getLogger(__name__)

#: Two forwards of the same images may differ by this much before the model counts as randomised; the
#: bound AutoAttack uses.
RANDOMISED_TOLERANCE = 1e-4


class Images(Protocol):
    """What is evaluated; `lrrobust.data.evaluation_set.EvaluationSet` is one."""

    indices: Sequence[int]
    keys: Sequence[str]
    wnids: Sequence[str]
    labels: Sequence[int]

    def __len__(self) -> int: ...

    def load(self, positions: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]: ...


@dataclass(frozen=True)
class Task:
    """One attack, at all its eps, on one chunk: what one part of the results holds."""

    spec: AttackSpec
    chunk: Chunk

    @property
    def part(self) -> tuple[str, int, int]:
        return self.spec.name, self.chunk.start, self.chunk.stop

    @property
    def cost(self) -> int:
        """Upper bound of the forward passes, all images of the chunk added up."""
        return attack_cost(self.spec) * (self.chunk.stop - self.chunk.start)


def attack_cost(spec: AttackSpec) -> int:
    """Upper bound of the forward passes for one image."""
    if spec.kind == "cw":
        return spec.binary_search_steps * spec.steps
    if spec.kind == "pgd":
        return len(spec.eps) * spec.steps * spec.restarts
    return len(spec.eps)


def plan_tasks(specs: Sequence[AttackSpec], n: int, chunk_size: int) -> list[Task]:
    """All tasks, chunk by chunk, so that an interrupted run has every attack on its first images."""
    return [Task(spec, chunk) for chunk in plan_chunks(n, chunk_size) for spec in specs]


def evaluate(
    model: nn.Module,
    num_classes: int,
    images: Images,
    tasks: Sequence[Task],
    store: RunStore,
    *,
    fingerprint: str,
    device: torch.device,
    part_metadata: Mapping[str, str],
    on_task: Callable[[Task, bool], None] | None = None,
    on_forward: Callable[[int], None] | None = None,
) -> None:
    """Does the tasks that the store does not hold yet.

    Args:
        model: images (N, 3, H, W) in [0, 1] -> logits (N, num_classes), on `device`.
        num_classes: width of the logits.
        images: what is evaluated.
        tasks: made by `plan_tasks`.
        store: takes one part a task, as soon as it is done.
        fingerprint: identifies the run; seeds derive from it.
        device: where to compute.
        part_metadata: stored with every part.
        on_task: called after every task with whether it was done now (False: the store had it).
        on_forward: called after every forward pass of an attack with how many images it took.

    Raises:
        ModelError: the model does not behave like a classifier.
        DataError: an image can no longer be read.
        StoreError: results cannot be written.
    """
    chunks: dict[Chunk, list[Task]] = {}
    for task in tasks:
        chunks.setdefault(task.chunk, []).append(task)
    with frozen(model):
        judge = Judge(model, num_classes)
        run = _Run(judge, fingerprint, on_forward)
        is_checked = False
        for chunk, group in chunks.items():
            missing = [task for task in group if not store.has_part(*task.part)]
            for task in group:
                if task not in missing and on_task is not None:
                    on_task(task, False)
            if not missing:
                continue
            batch = _ChunkImages.load(images, chunk, device)
            if not is_checked:
                check_model(model, num_classes, batch.images)
                is_checked = True
            clean = judge.predict(batch.images, batch.labels, batch.keys)
            for task in missing:
                rows = _attack_chunk(run, batch, clean, task)
                store.write_part(*task.part, rows_to_table(rows), part_metadata)
                if on_task is not None:
                    on_task(task, True)


@torch.no_grad()
def check_model(model: nn.Module, num_classes: int, images: torch.Tensor) -> None:
    """Runs the model twice on a few images before the long work starts.

    Raises:
        ModelError: it fails, or does not return (N, num_classes) logits.
    """
    few = images[:4]
    try:
        first, second = model(few), model(few)
    except Exception as error:
        raise ModelError(
            f"the model fails on images of shape {tuple(few.shape)} in [0, 1] with "
            f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        ) from error
    check_logits(first, len(few), num_classes)
    check_logits(second, len(few), num_classes)
    difference = (first - second).abs().max().item()
    if difference > RANDOMISED_TOLERANCE:
        _log.warning(
            "two forward passes of the same images differ by %.2g: the model is randomised, and attacks that "
            "do not average over its randomness overstate its robustness",
            difference,
        )


@dataclass(frozen=True)
class _Run:
    """What all tasks of a run share."""

    judge: Judge
    fingerprint: str
    on_forward: Callable[[int], None] | None


@dataclass(frozen=True)
class _ChunkImages:
    images: torch.Tensor
    labels: torch.Tensor
    indices: Sequence[int]
    keys: Sequence[str]
    wnids: Sequence[str]

    @classmethod
    def load(cls, images: Images, chunk: Chunk, device: torch.device) -> _ChunkImages:
        positions = range(*chunk)
        pixels, labels = images.load(positions)
        return cls(
            pixels.to(device),
            labels.to(device),
            [images.indices[i] for i in positions],
            [images.keys[i] for i in positions],
            [images.wnids[i] for i in positions],
        )


class _Outcomes:
    """What is known of a chunk's images under one attack, growing with eps; all tensors on the device."""

    def __init__(self, clean: Prediction, labels: torch.Tensor) -> None:
        count = len(labels)
        self.is_clean_correct = clean.label == labels
        self.is_broken = torch.zeros(count, dtype=torch.bool, device=labels.device)
        self.prediction = torch.full((count,), -1, device=labels.device)
        self.margin = torch.full((count,), math.nan, dtype=torch.float64, device=labels.device)
        self.linf = torch.full_like(self.margin, math.nan)
        self.l2 = torch.full_like(self.margin, math.nan)
        self.is_rejected = torch.zeros_like(self.is_broken)
        self.has_proposal = self.is_clean_correct.clone()

    @property
    def rows_to_attack(self) -> torch.Tensor:
        return (self.is_clean_correct & ~self.is_broken).nonzero().squeeze(1)


def _attack_chunk(run: _Run, batch: _ChunkImages, clean: Prediction, task: Task) -> list[dict[str, Any]]:
    """The rows of one task, all eps ascending."""
    if task.spec.kind == "cw":
        return _attack_minimal_norm(run, batch, clean, task)
    outcomes = _Outcomes(clean, batch.labels)
    rows: list[dict[str, Any]] = []
    for eps in task.spec.eps:
        # What is broken at one eps is inside every larger ball, so it needs no second attack.
        broken_before = outcomes.is_broken.clone()
        wall_s, forwarded = _attack_once(run, batch, outcomes, task, ThreatModel(task.spec.norm, eps))
        rows += _rows_at(batch, clean, outcomes, task, eps, broken_before, wall_s, forwarded)
    return rows


def _attack_minimal_norm(run: _Run, batch: _ChunkImages, clean: Prediction, task: Task) -> list[dict[str, Any]]:
    """One attack without a budget; the distances found are read off at every eps, and at infinity."""
    spec = task.spec
    found = _Outcomes(clean, batch.labels)
    wall_s, forwarded = _attack_once(run, batch, found, task, ThreatModel(spec.norm, math.inf))
    nearest = found.l2 if spec.norm == "l2" else found.linf
    rows: list[dict[str, Any]] = []
    broken_before = torch.zeros_like(found.is_broken)
    ladder = [*spec.eps, math.inf]
    for eps in ladder:
        at_eps = _Outcomes(clean, batch.labels)
        at_eps.is_broken = found.is_broken & (nearest <= eps)
        at_eps.prediction, at_eps.margin = found.prediction, found.margin
        at_eps.linf, at_eps.l2, at_eps.is_rejected = found.linf, found.l2, found.is_rejected
        # An adversarial image beyond eps is no proposal at eps.
        at_eps.has_proposal = found.has_proposal & (at_eps.is_broken | ~found.is_broken)
        # The one attack's cost is shared by all its eps, so that sums over rows are right.
        share = wall_s / len(ladder)
        passes = forwarded if math.isinf(eps) else torch.zeros_like(forwarded)
        rows += _rows_at(batch, clean, at_eps, task, eps, broken_before, share, passes)
        broken_before = at_eps.is_broken
    return rows


def _attack_once(
    run: _Run, batch: _ChunkImages, outcomes: _Outcomes, task: Task, threat: ThreatModel
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attacks what still stands and enters the verdicts; seconds and forward passes of each image."""
    wall_s = torch.zeros(len(batch.labels), dtype=torch.float64)
    forwarded = torch.zeros(len(batch.labels), dtype=torch.int64)
    rows = outcomes.rows_to_attack
    if not len(rows):
        return wall_s, forwarded
    started = time.perf_counter()
    eps = None if math.isinf(threat.eps) else threat.eps
    images, labels = batch.images[rows], batch.labels[rows]
    keys = [batch.keys[row] for row in rows.tolist()]
    witness = Witness(run.judge.model, images, labels, threat, run.on_forward)
    attack = build_attack(task.spec, eps)
    devices = [images.device] if images.device.type == "cuda" else []
    # torchattacks draws from the global generator; here it has a seed of its own and is put back.
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(chunk_seed(run.fingerprint, task.spec.name, eps, task.chunk.start))
        proposed = attack(witness, images, labels)
    if attack.nonfinite_gradients:
        _log.warning(
            "%s at eps %s met %d gradients with NaN or infinity: it was not at full strength",
            task.spec.name, eps, attack.nonfinite_gradients,
        )
    _enter_verdicts(run.judge, outcomes, rows, images, labels, proposed, threat, keys)
    nominated_rows, nominated = witness.nominated
    still_standing = ~outcomes.is_broken[rows[nominated_rows]]
    nominated_rows, nominated = nominated_rows[still_standing], nominated[still_standing]
    if len(nominated_rows):
        _enter_verdicts(
            run.judge, outcomes, rows[nominated_rows], images[nominated_rows], labels[nominated_rows], nominated, threat,
            [keys[row] for row in nominated_rows.tolist()], only_success=True,
        )
    attacked = rows.cpu()
    wall_s[attacked] = (time.perf_counter() - started) / len(rows)
    # Attacks that drop finished images do not say whose passes they were: the mean stands for each.
    forwarded[attacked] = round(witness.forwarded / len(rows))
    return wall_s, forwarded


def _enter_verdicts(
    judge: Judge,
    outcomes: _Outcomes,
    rows: torch.Tensor,
    images: torch.Tensor,
    labels: torch.Tensor,
    proposed: torch.Tensor,
    threat: ThreatModel,
    keys: Sequence[str],
    only_success: bool = False,
) -> None:
    judgement = judge.judge(images, labels, proposed, threat, keys)
    is_new = judgement.is_adversarial
    entered = rows[is_new] if only_success else rows
    chosen = is_new if only_success else torch.ones_like(is_new)
    outcomes.prediction[entered] = judgement.prediction.label[chosen]
    outcomes.margin[entered] = judgement.prediction.margin[chosen]
    outcomes.is_rejected[entered] = judgement.is_rejected[chosen]
    outcomes.is_broken[rows[is_new]] = True
    outcomes.linf[rows[is_new]] = judgement.linf_distance[is_new]
    outcomes.l2[rows[is_new]] = judgement.l2_distance[is_new]


def _rows_at(
    batch: _ChunkImages,
    clean: Prediction,
    outcomes: _Outcomes,
    task: Task,
    eps: float,
    broken_before: torch.Tensor,
    wall_s: torch.Tensor,
    forwarded: torch.Tensor,
) -> list[dict[str, Any]]:
    rows = []
    columns = zip(
        batch.indices, batch.keys, batch.wnids, batch.labels.tolist(), clean.label.tolist(), clean.margin.tolist(),
        outcomes.is_clean_correct.tolist(), outcomes.is_broken.tolist(), broken_before.tolist(),
        outcomes.is_rejected.tolist(), outcomes.has_proposal.tolist(), outcomes.prediction.tolist(), outcomes.margin.tolist(),
        outcomes.linf.tolist(), outcomes.l2.tolist(), wall_s.tolist(), forwarded.tolist(),
        strict=True,
    )
    for (
        index, key, wnid, label, clean_prediction, clean_margin, is_clean_correct, is_broken, was_broken,
        is_rejected, has_proposal, prediction, margin, linf, l2, seconds, passes,
    ) in columns:
        if not is_clean_correct:
            outcome = "wrong_when_clean"
        elif is_broken:
            outcome = "broken_at_smaller_eps" if was_broken else "broken"
        else:
            outcome = "rejected" if is_rejected else "robust"
        rows.append(
            {
                "index": index,
                "key": key,
                "label": label,
                "wnid": wnid,
                "attack": task.spec.name,
                "norm": task.spec.norm,
                "eps": eps,
                "clean_prediction": clean_prediction,
                "is_clean_correct": is_clean_correct,
                "adversarial_prediction": prediction if has_proposal else None,
                "is_broken": is_broken or not is_clean_correct,
                "outcome": outcome,
                "linf_distance": linf if is_clean_correct and is_broken else None,
                "l2_distance": l2 if is_clean_correct and is_broken else None,
                "clean_margin": clean_margin,
                "adversarial_margin": margin if has_proposal else None,
                "wall_s": seconds,
                "forward_passes": passes,
            }
        )
    return rows
