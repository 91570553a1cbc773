"""From images to rows: every attack on every chunk, judged, stored as it is finished."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, TypeVar

import pyarrow as pa
import torch
from torch import nn

from lrrobust.attacks.build import Attack, Effort
from lrrobust.attacks.specs import AttackSpec
from lrrobust.determinism import deterministic_float32, seeded
from lrrobust.errors import ModelError
from lrrobust.evaluation.chunks import DEFAULT_BATCH_SIZE, Chunk, chunk_seed, plan_chunks, start_seed
from lrrobust.evaluation.constancy import Constancy
from lrrobust.evaluation.judge import Judge, Judgement, Prediction, call_model
from lrrobust.evaluation.memory import FittingBatch
from lrrobust.evaluation.model_check import RANDOMISED_TOLERANCE, check_model
from lrrobust.evaluation.prefetch import Prefetch
from lrrobust.evaluation.quantization import quantize
from lrrobust.evaluation.task_queue import Sharing, TaskQueue
from lrrobust.frozen import frozen
from lrrobust.results import AdversarialImage, Example, RunStore, example_count, rows_to_table
from lrrobust.threat import NORMS, Norm, ThreatModel, distance

T = TypeVar("T")

_log = logging.getLogger(__name__)

#: Raise it with every change of this package that changes the rows of the same run: it is part of a
#: run's identity, so that old and new rows never mix. Passes on a GPU depend on what shares a batch there, and are not meant.
ROWS_VERSION = 4

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
        return self.spec.max_forward_passes * (self.chunk.stop - self.chunk.start)


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
    batch_size: int = DEFAULT_BATCH_SIZE,
    surrogate: Surrogate | None = None,
    real_pixels: Literal["judged", "saved"] | None = None,
    on_task: Callable[[Task, bool], None] | None = None,
    on_forward: Callable[[int], None] | None = None,
    on_begin: Callable[[Task, float], None] | None = None,
    sharing: Sharing | None = None,
) -> None:
    """Does the tasks that the store does not hold yet.

    With a surrogate the attacks know that model alone, its gradient and its predictions: nothing they propose depends
    on the judging model, but that they end once it is broken. Whether the surrogate withstands ends nothing: every
    start goes on to its last iterate, and every proposal, on the way or last, is judged in the ball around the clean
    image. Attacked are the images that the judging model classifies correctly, as ever.

    With `real_pixels` every verified adversarial image is rounded to 8 bits inside ball and box and judged again, and an
    attack goes on until an image so rounded breaks the model.
    Images of the next chunk are read while the present one is attacked. What does not fit into memory is done again in
    smaller batches, which the part's metadata says.

    Args:
        model: images (N, 3, H, W) in [0, 1] -> logits (N, num_classes), on `device`.
        num_classes: width of the logits.
        images: what is evaluated.
        tasks: made by `plan_tasks`.
        store: takes one part a task, as soon as it is done.
        fingerprint: identifies the run; seeds derive from it.
        device: where to compute.
        part_metadata: stored with every part.
        batch_size: images passed through the model at once. Decides the last bits of logits, and with
            them now and then a row.
        surrogate: is attacked in the model's stead.
        real_pixels: "judged": fill the column is_broken_quantized; "saved": keep the rounded images as well.
        on_task: called after every task with whether it was done here (False: the store had it).
        on_forward: called after every forward pass of an attack with how many images it took.
        on_begin: called before a task is done here with the share of its cost that it can come to, in [0, 1]: only images
            that are correct when clean are attacked, and only at budgets at which they stand.
        sharing: for a process that shares the run with others; returns when all tasks are done, by whomever.

    Raises:
        ModelError: the model does not behave like a classifier, or changes on the way.
        DataError: an image can no longer be read.
        StoreError: results cannot be written.
    """
    def on_stored(task: Task) -> None:
        if on_task is not None:
            on_task(task, False)

    attacked = nullcontext() if surrogate is None else frozen(surrogate.model)
    with (
        frozen(model),
        attacked,
        deterministic_float32(),
        TaskQueue(tasks, store, sharing, on_stored) as queue,
        Prefetch(lambda chunk: _ChunkImages.load(images, chunk)) as reader,
    ):

        def heard(count: int) -> None:
            queue.renew()
            if on_forward is not None:
                on_forward(count)

        told = on_begin or (lambda *_: None)
        run = _Run(Judge(model, num_classes, batch_size), fingerprint, heard, told, surrogate, real_pixels)
        at_hand = _AtHand(run, reader, device)
        # A resumed run computes one chunk of what it has again, to be sure it is the same model.
        if known := next((task for task in queue.drop_stored() if store.has_part(*task.part)), None):
            _check_same_model(store, known, *at_hand.load(known.chunk), at_hand.metadata)
        for task in queue:
            batch, clean = at_hand.load(task.chunk)
            reader.start(queue.chunk_after(task.chunk))
            broken_at = _BrokenAt(len(batch.indices))
            for earlier in queue.earlier(task):
                broken_at.enter(earlier, store.read_part(*earlier.part), real_pixels is not None)
            outcomes, rows, met = at_hand.fitting(lambda: _attack_chunk(run, batch, clean, task, broken_at))
            at_hand.check_constancy()
            if examples := _examples(batch, outcomes, task):
                store.write_examples(*task.part, examples)
            if real_pixels == "saved" and (images_kept := _adversarial_images(batch, outcomes, task)):
                store.write_adversarial(*task.part, images_kept)
            used = {"batch_size": str(run.judge.batch_size)}
            store.write_part(*task.part, rows_to_table(rows), {**part_metadata, **at_hand.metadata, **used, **met})
            if on_task is not None:
                on_task(task, True)


class _AtHand:
    """The model, known to be one that can be judged, and the chunk that it is at.

    Attributes:
        metadata: what the results must say of the model, once a chunk is loaded.
    """

    def __init__(self, run: _Run, reader: Prefetch[_ChunkImages], device: torch.device) -> None:
        self.metadata: dict[str, str] = {}
        self._run = run
        self._reader = reader
        self._device = device
        self._batch_size = FittingBatch(run.judge.batch_size, device)
        self._constancy: Constancy | None = None
        self._is_checked = False
        self._chunk: tuple[Chunk, _ChunkImages, Prediction] | None = None

    def load(self, chunk: Chunk) -> tuple[_ChunkImages, Prediction]:
        """The images of a chunk, and what the model makes of them."""
        if self._chunk is None or self._chunk[0] != chunk:
            # The former ones go before the next come.
            self._chunk = None
            batch = self._reader.get(chunk).to(self._device)
            if not self._is_checked:
                self._check(batch.images)
            self._chunk = chunk, batch, self.fitting(lambda: self._predict(chunk, batch))
        return self._chunk[1:]

    def fitting(self, work: Callable[[], T]) -> T:
        """Work of the judge's model, in batches that fit into memory."""

        def try_with(batch_size: int) -> T:
            self._run.judge.batch_size = batch_size
            return work()

        return self._batch_size.run(try_with)

    def check_constancy(self) -> None:
        """Raises ModelError when the model is not what it was; a randomised one is marked already."""
        if self._constancy is not None:
            self._constancy.check()

    def _check(self, images: torch.Tensor) -> None:
        judge, wanted = self._run.judge, self._batch_size.size

        def check() -> tuple[dict[str, str], Constancy | None]:
            # Fewer than the check takes by itself only where they do not fit.
            few = images if judge.batch_size == wanted else images[: judge.batch_size]
            surrogate = self._run.surrogate
            found = check_model(judge.model, judge.num_classes, few, surrogate is None)
            if surrogate is not None:
                check_model(surrogate.model, surrogate.num_classes, few)
            return found, None if "randomised" in found else Constancy(judge.model, few[:2], RANDOMISED_TOLERANCE)

        self.metadata, self._constancy = self.fitting(check)
        self._is_checked = True

    def _predict(self, chunk: Chunk, batch: _ChunkImages) -> Prediction:
        with seeded(self._device, chunk_seed(self._run.fingerprint, "clean", chunk.start)):
            return self._run.judge.predict(batch.images, batch.labels, batch.keys)


def _check_same_model(
    store: RunStore, known: Task, batch: _ChunkImages, clean: Prediction, metadata: Mapping[str, str]
) -> None:
    """Raises ModelError unless the rows of a stored task were computed with this model."""
    if "randomised" in metadata:
        return
    rows = store.read_part(*known.part)
    stored = dict(zip(rows["index"].to_pylist(), rows["clean_margin"].to_pylist(), strict=True))
    pairs = [(stored[i], now) for i, now in zip(batch.indices, clean.margin.tolist(), strict=True)]
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
    on_forward: Callable[[int], None]
    on_begin: Callable[[Task, float], None]
    surrogate: Surrogate | None = None
    real_pixels: Literal["judged", "saved"] | None = None


@dataclass(frozen=True)
class _ChunkImages:
    images: torch.Tensor
    labels: torch.Tensor
    indices: Sequence[int]
    keys: Sequence[str]
    wnids: Sequence[str]

    @classmethod
    def load(cls, images: Images, chunk: Chunk) -> _ChunkImages:
        positions = range(*chunk)
        pixels, labels = images.load(positions)
        return cls(
            pixels,
            labels,
            [images.indices[i] for i in positions],
            [images.keys[i] for i in positions],
            [images.wnids[i] for i in positions],
        )

    def to(self, device: torch.device) -> _ChunkImages:
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))


class _Watched(nn.Module):
    """The model that an attack is given: its failures are one line, and its forwards are told."""

    def __init__(self, run: _Run) -> None:
        super().__init__()
        self.model = run.judge.model if run.surrogate is None else run.surrogate.model
        self._on_forward = run.on_forward

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits = call_model(self.model, images)
        self._on_forward(len(images))
        return logits


class _Outcomes:
    """What is known of a chunk's N images under one attack with L budgets; all tensors on the device.

    `nearest` (N, 3, H, W) is the nearest verified adversarial image, the clean one where there is none;
    `prediction`, `margin` and the distances (N,) are its own, infinity where there is none. From budget `breaks_at` (N,) on
    some verified adversarial image counts. `last_...` and `is_rejected` (L, N) tell of the last proposal at each budget, of the clean image where there was none. Of adversarial images
    rounded to 8 bits, `quantized` is the nearest verified one, float64 `quantized_at` the budget from which on it counts,
    infinity where there is none, and `quantized_prediction` its own.
    """

    def __init__(self, images: torch.Tensor, clean: Prediction, labels: torch.Tensor, levels: int) -> None:
        self.nearest = images.clone()
        self.is_clean_correct = clean.label == labels
        self.prediction, self.margin = clean.label.clone(), clean.margin.clone()
        self.breaks_at = torch.full_like(clean.margin, math.inf)
        self.linf = torch.full_like(clean.margin, math.inf)
        self.l2 = torch.full_like(clean.margin, math.inf)
        self.l1 = torch.full_like(clean.margin, math.inf)
        self.last_prediction, self.last_margin = clean.label.repeat(levels, 1), clean.margin.repeat(levels, 1)
        self.is_rejected = torch.zeros_like(self.last_prediction, dtype=torch.bool)
        self.quantized: torch.Tensor | None = None
        self.quantized_prediction = clean.label.clone()
        self.quantized_at = torch.full_like(clean.margin, math.inf)

    @property
    def is_broken(self) -> torch.Tensor:
        """Of which images there is a verified adversarial one, bool (N,)."""
        return self.breaks_at.isfinite()

    def enter(
        self, rows: torch.Tensor, proposed: torch.Tensor, verdict: Judgement, threat: ThreatModel
    ) -> torch.Tensor:
        """Keeps the nearest adversarial image of each row; which rows are broken within their eps by now, bool (M,)."""
        nearest, found = self.distance(threat.norm), verdict.distance(threat.norm)
        is_nearer = verdict.is_adversarial & (found < nearest[rows])
        better = rows[is_nearer]
        self.nearest[better] = proposed[is_nearer].detach().to(self.nearest)
        self.prediction[better] = verdict.prediction.label[is_nearer]
        self.margin[better] = verdict.prediction.margin[is_nearer]
        self.linf[better] = verdict.linf_distance[is_nearer]
        self.l2[better] = verdict.l2_distance[is_nearer]
        self.l1[better] = verdict.l1_distance[is_nearer]
        # Of every proposal, not of the nearest alone: its distance may exceed its eps by the tolerance of the ball, and one
        # of a larger eps be nearer by less than that.
        eps = torch.as_tensor(threat.eps).to(found).expand_as(found)
        reached = torch.where(verdict.is_adversarial, torch.minimum(found, eps), math.inf)
        self.breaks_at[rows] = torch.minimum(self.breaks_at[rows], reached)
        return self.is_broken[rows] & (self.breaks_at[rows] <= eps)

    def enter_quantized(
        self, rows: torch.Tensor, rounded: torch.Tensor, verdict: Judgement, threat: ThreatModel
    ) -> None:
        """Keeps the nearest adversarial image of 8 bits of each row."""
        reached = verdict.distance(threat.norm).minimum(torch.as_tensor(threat.eps).to(self.quantized_at))
        is_nearer = verdict.is_adversarial & (reached < self.quantized_at[rows])
        better = rows[is_nearer]
        if self.quantized is None:
            self.quantized = self.nearest.clone()
        self.quantized[better] = rounded[is_nearer].to(self.quantized)
        self.quantized_at[better] = reached[is_nearer]
        self.quantized_prediction[better] = verdict.prediction.label[is_nearer]

    def distance(self, norm: Norm) -> torch.Tensor:
        """Of the nearest adversarial images, in one norm."""
        return {"linf": self.linf, "l2": self.l2, "l1": self.l1}[norm]

    def enter_last(self, levels: torch.Tensor, rows: torch.Tensor, verdict: Judgement, is_last: torch.Tensor) -> None:
        """Keeps what became of those proposals that were the last of their start."""
        at = levels[is_last], rows[is_last]
        self.last_prediction[at] = verdict.prediction.label[is_last]
        self.last_margin[at] = verdict.prediction.margin[is_last]
        self.is_rejected[at] = verdict.is_rejected[is_last]


@dataclass(frozen=True)
class _AtEps:
    """What an attack left at one eps: its cost, and what it last proposed for images still standing."""

    eps: float
    wall_s: torch.Tensor
    forwarded: torch.Tensor
    backwarded: torch.Tensor
    prediction: torch.Tensor
    margin: torch.Tensor
    is_rejected: torch.Tensor


class _BrokenAt:
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


def _attack_chunk(
    run: _Run, batch: _ChunkImages, clean: Prediction, task: Task, broken_at: _BrokenAt
) -> tuple[_Outcomes, list[dict[str, Any]], dict[str, str]]:
    """What one task did to its images, their rows, all eps ascending, and what the results must say of the attack."""
    spec = task.spec
    attack = Attack(spec)
    outcomes = _Outcomes(batch.images, clean, batch.labels, len(attack.ladder))
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
        _AtEps(*at_eps)
        for at_eps in zip(
            attack.ladder, wall_s, forwarded, backwarded, outcomes.last_prediction, outcomes.last_margin, outcomes.is_rejected, strict=True
        )
    ]
    if attack.ladder == (math.inf,):
        # A minimal-norm attack runs once, without a budget; its distances are read off at every eps.
        (unbounded,) = ladder
        nothing = torch.zeros_like(forwarded[0])
        free = replace(unbounded, wall_s=nothing.double(), forwarded=nothing, backwarded=nothing)
        ladder = [*(replace(free, eps=eps) for eps in spec.eps), unbounded]
    return outcomes, _rows(batch, clean, outcomes, task, ladder, earlier, run.real_pixels is not None), met


def _run_attack(
    run: _Run, attack: Attack, spec: AttackSpec, batch: _ChunkImages, outcomes: _Outcomes, rows: torch.Tensor,
    levels: torch.Tensor, chunk: Chunk,
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
        verdict = run.judge.judge(images[at], labels[at], proposed, threat, [keys[row] for row in claimed])
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
    run: _Run, batch: _ChunkImages, outcomes: _Outcomes, rows: torch.Tensor, proposed: torch.Tensor, verdict: Judgement,
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


def _rows(
    batch: _ChunkImages, clean: Prediction, outcomes: _Outcomes, task: Task, ladder: Sequence[_AtEps],
    earlier: torch.Tensor, in_8_bits: bool,
) -> list[dict[str, Any]]:
    """One row per eps and image.

    An image counts as broken at eps when its verified adversarial image lies within eps, also where
    the attack found it at a larger eps only. `earlier` (N,): distances at which attacks before broke them.
    """
    final = zip(
        outcomes.is_broken.tolist(),
        outcomes.breaks_at.tolist(),
        outcomes.prediction.tolist(),
        outcomes.margin.tolist(),
        outcomes.linf.tolist(),
        outcomes.l2.tolist(),
        outcomes.l1.tolist(),
        outcomes.quantized_at.tolist(),
        earlier.tolist(),
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
            step.backwarded.tolist(),
            step.prediction.tolist(),
            step.margin.tolist(),
            step.is_rejected.tolist(),
            strict=True,
        )
        for image, proposal in zip(images, at_eps, strict=True):
            index, key, wnid, label, clean_prediction, clean_margin, is_clean_correct, found = image
            ever_broken, breaks_at, prediction, margin, linf, l2, l1, quantized_at, broken_earlier_at = found
            wall_s, forwarded, backwarded, last_prediction, last_margin, is_rejected = proposal
            is_broken = ever_broken and breaks_at <= step.eps
            # Infinity stands for never, also where the budget is infinite.
            was_broken_before = math.isfinite(broken_earlier_at) and broken_earlier_at <= step.eps and not is_broken
            is_broken_quantized = None
            if in_8_bits and is_broken:
                in_8_bits_at = min(quantized_at, broken_earlier_at)
                is_broken_quantized = math.isfinite(in_8_bits_at) and in_8_bits_at <= step.eps
            # A minimal-norm attack's image beyond eps is no proposal at eps.
            is_beyond = task.spec.minimises and ever_broken and not is_broken
            has_proposal = is_clean_correct and not is_beyond and not was_broken_before
            if not is_clean_correct:
                outcome = "wrong_when_clean"
            elif is_broken:
                outcome = "broken_at_smaller_eps" if breaks_at <= smaller_eps else "broken"
            elif was_broken_before:
                outcome = "broken_by_earlier_attack"
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
                    "is_broken": is_broken or was_broken_before or not is_clean_correct,
                    "outcome": outcome,
                    "linf_distance": linf if is_broken else None,
                    "l2_distance": l2 if is_broken else None,
                    "l1_distance": l1 if is_broken else None,
                    "is_broken_quantized": is_broken_quantized,
                    "clean_margin": clean_margin,
                    "adversarial_margin": (margin if is_broken else last_margin) if has_proposal else None,
                    "wall_s": wall_s,
                    "forward_passes": forwarded,
                    "backward_passes": backwarded,
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


def _adversarial_images(batch: _ChunkImages, outcomes: _Outcomes, task: Task) -> list[AdversarialImage]:
    """The verified adversarial images of 8 bits, one at most for each image."""
    if outcomes.quantized is None:
        return []
    rows = outcomes.quantized_at.isfinite().nonzero().squeeze(1)
    clean, found = batch.images[rows], outcomes.quantized[rows]
    lengths = {f"{norm}_distance": distance(clean, found, norm).tolist() for norm in NORMS}
    pixels = [(255 * images).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy() for images in (clean, found)]
    reached, predictions = outcomes.quantized_at[rows].tolist(), outcomes.quantized_prediction[rows].tolist()
    return [
        AdversarialImage(
            batch.indices[row], batch.keys[row], batch.wnids[row], int(batch.labels[row]), predictions[place], task.spec.norm,
            next((eps for eps in task.spec.eps if reached[place] <= eps), math.inf),
            **{name: values[place] for name, values in lengths.items()}, clean=pixels[0][place], adversarial=pixels[1][place],
        )
        for place, row in enumerate(rows.tolist())
    ]
