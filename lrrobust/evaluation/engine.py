"""From images to rows: every attack on every chunk, judged, stored as it is finished."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import nn

from lrrobust.attacks.build import build_attack
from lrrobust.attacks.specs import AttackSpec
from lrrobust.errors import ModelError
from lrrobust.evaluation.chunks import Chunk, chunk_seed, plan_chunks
from lrrobust.evaluation.judge import Judge, Prediction, Witness, call_model, check_logits
from lrrobust.frozen import frozen
from lrrobust.results import Example, RunStore, example_count, rows_to_table
from lrrobust.threat import ThreatModel

_log = logging.getLogger(__name__)

#: Raise it with every change of this package that changes the rows of the same run: it is part of a
#: run's identity, so that old and new rows never mix.
ROWS_VERSION = 1

#: Two forwards of the same images may differ by this much before the model counts as randomised; the
#: bound AutoAttack uses.
RANDOMISED_TOLERANCE = 1e-4

#: Logits of one image, alone and among others, may differ by this share of the largest logit.
BATCH_TOLERANCE = 1e-2

#: Clean margins stored earlier and computed now may differ by this share of the largest margin: other
#: processors round differently, another model does more.
RESUME_TOLERANCE = 1e-2


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
    with frozen(model), _deterministic_float32():
        run = _Run(Judge(model, num_classes), fingerprint, on_forward)
        metadata: dict[str, str] | None = None
        is_resumed = False
        for chunk, group in chunks.items():
            stored = [task for task in group if store.has_part(*task.part)]
            for task in stored:
                if on_task is not None:
                    on_task(task, False)
            # A resumed run computes one chunk of what it has again, to be sure it is the same model.
            is_to_compare = bool(stored) and not is_resumed
            if len(stored) == len(group) and not is_to_compare:
                continue
            try:
                batch = _ChunkImages.load(images, chunk, device)
                if metadata is None:
                    metadata = {**part_metadata, **check_model(model, num_classes, batch.images)}
                with _seeded(batch.images.device, chunk_seed(fingerprint, "clean", None, chunk.start)):
                    clean = run.judge.predict(batch.images, batch.labels, batch.keys)
                if is_to_compare:
                    _check_same_model(store, batch, clean, metadata)
                    is_resumed = True
                for task in group:
                    if task in stored:
                        continue
                    outcomes, rows, met = _attack_chunk(run, batch, clean, task)
                    if examples := _examples(batch, outcomes, task):
                        store.write_examples(*task.part, examples)
                    store.write_part(*task.part, rows_to_table(rows), {**metadata, **met})
                    if on_task is not None:
                        on_task(task, True)
            except torch.OutOfMemoryError as error:
                raise ModelError(
                    f"out of memory on {device} with {chunk.stop - chunk.start} images at once: "
                    f"use a smaller --chunk-size ({' '.join(str(error).split())[:120]})"
                ) from error


@contextmanager
def _deterministic_float32() -> Iterator[None]:
    """No TF32 and no autotuned kernels on CUDA: the rows say float32, and a rerun must give the same."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark, matmul.allow_tf32
    try:
        cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark, matmul.allow_tf32 = False, True, False, False
        yield
    finally:
        cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark, matmul.allow_tf32 = before


@contextmanager
def _seeded(device: torch.device, seed: int) -> Iterator[None]:
    """Torch's global generators start at `seed` inside, and are put back afterwards."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def check_model(model: nn.Module, num_classes: int, images: torch.Tensor) -> dict[str, str]:
    """Tries the model on a few images before the long work starts.

    Returns:
        What the results must say of the model: {"randomised": ...} where two forwards differ.

    Raises:
        ModelError: it fails, does not return (N, num_classes) logits, gives no gradient, or lets the
            images of a batch influence each other.
    """
    few = images[:4].clone().requires_grad_()
    with torch.enable_grad():
        first = call_model(model, few)
        check_logits(first, len(few), num_classes)
        if not first.requires_grad:
            raise ModelError(
                "the model's logits carry no gradient (a detach, no_grad or rounding inside?): "
                "gradient attacks cannot judge it"
            )
        torch.autograd.grad(first.sum(), few, allow_unused=True)
    with torch.no_grad():
        second = call_model(model, images[:4])
        half = call_model(model, images[: -(-len(few) // 2)])
    check_logits(second, len(few), num_classes)
    check_logits(half, -(-len(few) // 2), num_classes)
    difference = (first - second).abs().max().item()
    if difference > RANDOMISED_TOLERANCE:
        _log.warning(
            "two forward passes of the same images differ by %.2g: the model is randomised, and attacks that "
            "do not average over its randomness overstate its robustness",
            difference,
        )
        return {"randomised": "yes: robustness is overstated"}
    if (half - second[: len(half)]).abs().max() > BATCH_TOLERANCE * second.abs().max().clamp_min(1e-3):
        raise ModelError(
            "the model's logits of an image depend on the other images of the batch "
            "(BatchNorm without running statistics?): no accuracy of such a model means anything"
        )
    return {}


def _check_same_model(
    store: RunStore, batch: _ChunkImages, clean: Prediction, metadata: Mapping[str, str]
) -> None:
    """Raises ModelError unless the stored rows were computed with this model."""
    if "randomised" in metadata:
        return
    rows = store.read_rows()
    stored = dict(zip(rows["index"].tolist(), rows["clean_margin"].tolist(), strict=True))
    pairs = [(stored[i], now) for i, now in zip(batch.indices, clean.margin.tolist(), strict=True) if i in stored]
    scale = max(abs(before) for before, _ in pairs)
    if any(abs(before - now) > RESUME_TOLERANCE * max(scale, 1e-3) for before, now in pairs):
        raise ModelError(
            f"{store.folder} holds results of another model: the same images had other logits then "
            "(its code, or a library, has changed); choose another --out, or delete that folder"
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
    """What is known of a chunk's images under one attack, growing with eps; all tensors on the device.

    For broken images `nearest` is the nearest verified adversarial image, and `prediction`, `margin` and
    the distances are its own; for others `nearest` is the clean image, and they are those of the last
    proposal. `found_at` is the eps at which the attack broke the image, infinity while it has not.
    """

    def __init__(self, images: torch.Tensor, clean: Prediction, labels: torch.Tensor) -> None:
        self.nearest = images.clone()
        self.is_clean_correct = clean.label == labels
        self.is_broken = torch.zeros_like(self.is_clean_correct)
        self.is_rejected = torch.zeros_like(self.is_clean_correct)
        self.prediction, self.margin = clean.label.clone(), clean.margin.clone()
        self.found_at = torch.full_like(clean.margin, math.inf)
        self.linf = torch.full_like(clean.margin, math.inf)
        self.l2 = torch.full_like(clean.margin, math.inf)

    @property
    def rows_to_attack(self) -> torch.Tensor:
        return (self.is_clean_correct & ~self.is_broken).nonzero().squeeze(1)


@dataclass(frozen=True)
class _AtEps:
    """What an attack left at one eps: its cost, and what it last proposed for images still standing."""

    eps: float
    wall_s: torch.Tensor
    forwarded: torch.Tensor
    prediction: torch.Tensor
    margin: torch.Tensor
    is_rejected: torch.Tensor


def _attack_chunk(
    run: _Run, batch: _ChunkImages, clean: Prediction, task: Task
) -> tuple[_Outcomes, list[dict[str, Any]], dict[str, str]]:
    """What one task did to its images, their rows, all eps ascending, and what the results must say of the attack."""
    spec = task.spec
    outcomes = _Outcomes(batch.images, clean, batch.labels)
    ladder: list[_AtEps] = []
    nonfinite = 0
    # A minimal-norm attack runs once, without a budget; its distances are read off at every eps.
    is_minimal = spec.kind == "cw"
    for eps in [math.inf] if is_minimal else spec.eps:
        # What is broken at one eps is inside every larger ball, so it needs no second attack.
        wall_s, forwarded, count = _attack_once(run, batch, outcomes, task, ThreatModel(spec.norm, eps))
        nonfinite += count
        ladder.append(
            _AtEps(
                eps, wall_s, forwarded, outcomes.prediction.clone(), outcomes.margin.clone(), outcomes.is_rejected.clone()
            )
        )
    if is_minimal:
        unbounded = ladder.pop()
        free = replace(unbounded, wall_s=torch.zeros_like(wall_s), forwarded=torch.zeros_like(forwarded))
        ladder = [*(replace(free, eps=eps) for eps in spec.eps), unbounded]
    met = {"nonfinite_gradients": "yes: the attack was not at full strength"} if nonfinite else {}
    return outcomes, _rows(batch, clean, outcomes, task, ladder), met


def _attack_once(
    run: _Run, batch: _ChunkImages, outcomes: _Outcomes, task: Task, threat: ThreatModel
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Attacks what still stands and enters the verdicts.

    Returns:
        Seconds and forward passes of each image, and how many gradients were not finite.
    """
    wall_s = torch.zeros(len(batch.labels), dtype=torch.float64)
    forwarded = torch.zeros(len(batch.labels), dtype=torch.int64)
    rows = outcomes.rows_to_attack
    if not len(rows) or threat.eps == 0:
        return wall_s, forwarded, 0
    started = time.perf_counter()
    eps = None if math.isinf(threat.eps) else threat.eps
    images, labels = batch.images[rows], batch.labels[rows]
    keys = [batch.keys[row] for row in rows.tolist()]
    witness = Witness(run.judge.model, images, labels, threat, run.on_forward)
    attack = build_attack(task.spec, eps)
    # torchattacks draws from the global generator.
    with _seeded(images.device, chunk_seed(run.fingerprint, task.spec.name, eps, task.chunk.start)):
        proposed = attack(witness, images, labels)
        _enter(run.judge, outcomes, rows, images, labels, proposed, threat, keys, is_last_proposal=True)
        nominated_rows, nominated = witness.nominated
        if len(nominated_rows):
            _enter(
                run.judge,
                outcomes,
                rows[nominated_rows],
                images[nominated_rows],
                labels[nominated_rows],
                nominated,
                threat,
                [keys[row] for row in nominated_rows.tolist()],
                is_last_proposal=False,
            )
    if attack.nonfinite_gradients:
        _log.warning(
            "%s at eps %s met %d gradients with NaN or infinity: it was not at full strength",
            task.spec.name,
            eps,
            attack.nonfinite_gradients,
        )
    attacked = rows.cpu()
    wall_s[attacked] = (time.perf_counter() - started) / len(rows)
    # Attacks that drop finished images do not say whose passes they were: the mean stands for each.
    forwarded[attacked] = round(witness.forwarded / len(rows))
    return wall_s, forwarded, attack.nonfinite_gradients


def _enter(
    judge: Judge,
    outcomes: _Outcomes,
    rows: torch.Tensor,
    images: torch.Tensor,
    labels: torch.Tensor,
    proposed: torch.Tensor,
    threat: ThreatModel,
    keys: Sequence[str],
    is_last_proposal: bool,
) -> None:
    """Judges proposals for some rows; keeps the nearest adversarial image of each."""
    verdict = judge.judge(images, labels, proposed, threat, keys)
    nearest = outcomes.linf if threat.norm == "linf" else outcomes.l2
    found = verdict.linf_distance if threat.norm == "linf" else verdict.l2_distance
    is_nearer = verdict.is_adversarial & (found < nearest[rows])
    is_entered = is_nearer | is_last_proposal
    outcomes.prediction[rows[is_entered]] = verdict.prediction.label[is_entered]
    outcomes.margin[rows[is_entered]] = verdict.prediction.margin[is_entered]
    if is_last_proposal:
        outcomes.is_rejected[rows] = verdict.is_rejected
    better = rows[is_nearer]
    outcomes.nearest[better] = proposed[is_nearer].detach()
    outcomes.is_broken[better] = True
    outcomes.found_at[better] = threat.eps
    outcomes.linf[better] = verdict.linf_distance[is_nearer]
    outcomes.l2[better] = verdict.l2_distance[is_nearer]


def _rows(
    batch: _ChunkImages, clean: Prediction, outcomes: _Outcomes, task: Task, ladder: Sequence[_AtEps]
) -> list[dict[str, Any]]:
    """One row per eps and image.

    An image counts as broken at eps when its verified adversarial image lies within eps, also where
    the attack found it at a larger eps only.
    """
    nearest = outcomes.linf if task.spec.norm == "linf" else outcomes.l2
    final = zip(
        outcomes.is_broken.tolist(),
        torch.minimum(nearest, outcomes.found_at).tolist(),
        outcomes.prediction.tolist(),
        outcomes.margin.tolist(),
        outcomes.linf.tolist(),
        outcomes.l2.tolist(),
        strict=True,
    )
    images = list(
        zip(
            batch.indices,
            batch.keys,
            batch.wnids,
            batch.labels.tolist(),
            clean.label.tolist(),
            clean.margin.tolist(),
            outcomes.is_clean_correct.tolist(),
            final,
            strict=True,
        )
    )
    rows = []
    smaller_eps = -math.inf
    for step in ladder:
        at_eps = zip(
            step.wall_s.tolist(),
            step.forwarded.tolist(),
            step.prediction.tolist(),
            step.margin.tolist(),
            step.is_rejected.tolist(),
            strict=True,
        )
        for image, proposal in zip(images, at_eps, strict=True):
            index, key, wnid, label, clean_prediction, clean_margin, is_clean_correct, found = image
            ever_broken, breaks_at, prediction, margin, linf, l2 = found
            wall_s, forwarded, last_prediction, last_margin, is_rejected = proposal
            is_broken = ever_broken and breaks_at <= step.eps
            # A minimal-norm attack's image beyond eps is no proposal at eps.
            has_proposal = is_clean_correct and not (task.spec.kind == "cw" and ever_broken and not is_broken)
            if not is_clean_correct:
                outcome = "wrong_when_clean"
            elif is_broken:
                outcome = "broken_at_smaller_eps" if breaks_at <= smaller_eps else "broken"
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
                    "eps": step.eps,
                    "clean_prediction": clean_prediction,
                    "is_clean_correct": is_clean_correct,
                    "adversarial_prediction": (prediction if is_broken else last_prediction) if has_proposal else None,
                    "is_broken": is_broken or not is_clean_correct,
                    "outcome": outcome,
                    "linf_distance": linf if is_broken else None,
                    "l2_distance": l2 if is_broken else None,
                    "clean_margin": clean_margin,
                    "adversarial_margin": (margin if is_broken else last_margin) if has_proposal else None,
                    "wall_s": wall_s,
                    "forward_passes": forwarded,
                }
            )
        smaller_eps = step.eps
    return rows


def _examples(batch: _ChunkImages, outcomes: _Outcomes, task: Task) -> list[Example]:
    """The correct ones among the first images of the subset: the same images whatever the model and attack."""
    kept = example_count(*batch.images.shape[-2:]) - task.chunk.start
    examples = []
    for row in outcomes.is_clean_correct[: max(kept, 0)].nonzero().flatten().tolist():
        clean = batch.images[row].permute(1, 2, 0)
        perturbation = (outcomes.nearest[row] - batch.images[row]).permute(1, 2, 0).half().cpu().numpy()
        examples.append(
            Example(
                batch.indices[row],
                (255 * clean).round().to(torch.uint8).cpu().numpy(),
                perturbation if outcomes.is_broken[row] else None,
            )
        )
    return examples
