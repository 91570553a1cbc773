"""From images to rows: every attack on every chunk, judged, stored as it is finished."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Literal, TypeVar

import torch
from torch import nn

from lrrobust.determinism import deterministic_float32, seeded
from lrrobust.errors import ModelError
from lrrobust.evaluation.chunk_attack import RunSettings, Surrogate, attack_chunk
from lrrobust.evaluation.chunk_images import ChunkImages, Images
from lrrobust.evaluation.chunks import DEFAULT_BATCH_SIZE, Chunk, chunk_seed
from lrrobust.evaluation.constancy import Constancy
from lrrobust.evaluation.judge import Judge, Prediction
from lrrobust.evaluation.memory import FittingBatch
from lrrobust.evaluation.model_check import RANDOMISED_TOLERANCE, TRIED, check_model
from lrrobust.evaluation.outcomes import BrokenAt
from lrrobust.evaluation.prefetch import Prefetch
from lrrobust.evaluation.rows import make_adversarial_images, make_examples
from lrrobust.evaluation.task_queue import Sharing, TaskQueue
from lrrobust.evaluation.tasks import Task
from lrrobust.frozen import frozen
from lrrobust.results import RunStore, rows_to_table

T = TypeVar("T")

#: Raise it with every change of this package that changes the rows of the same run: it is part of a
#: run's identity, so that old and new rows never mix. Passes on a GPU depend on what shares a batch there, and are not meant.
ROWS_VERSION = 7

#: Clean margins stored earlier and computed now may differ by this share of the largest margin: other
#: processors round differently, another model does more.
RESUME_TOLERANCE = 1e-2


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
        Prefetch(lambda chunk: ChunkImages.load(images, chunk)) as reader,
    ):

        def heard(count: int) -> None:
            queue.renew()
            if on_forward is not None:
                on_forward(count)

        told = on_begin or (lambda *_: None)
        run = RunSettings(Judge(model, num_classes, batch_size), fingerprint, heard, told, surrogate, real_pixels)
        at_hand = _AtHand(run, reader, device, any(task.spec.needs_gradient for task in tasks))
        # A resumed run computes one chunk of what it has again, to be sure it is the same model.
        if known := next((task for task in queue.drop_stored() if store.has_part(*task.part)), None):
            _check_same_model(store, known, *at_hand.load(known.chunk), at_hand.metadata)
        for task in queue:
            batch, clean = at_hand.load(task.chunk)
            reader.start(queue.chunk_after(task.chunk))
            broken_at = BrokenAt(len(batch.indices))
            for earlier in queue.earlier(task):
                broken_at.enter(earlier, store.read_part(*earlier.part), real_pixels is not None)
            outcomes, rows, met = at_hand.fitting(lambda: attack_chunk(run, batch, clean, task, broken_at))
            at_hand.check_constancy()
            if examples := make_examples(batch, outcomes, task):
                store.write_examples(*task.part, examples)
            if real_pixels == "saved":
                # Where there are none as well: a file that is not there is one that was lost.
                store.write_adversarial(*task.part, make_adversarial_images(batch, outcomes, task))
            used = {"batch_size": str(run.judge.batch_size)}
            store.write_part(*task.part, rows_to_table(rows), {**part_metadata, **at_hand.metadata, **used, **met})
            if on_task is not None:
                on_task(task, True)


class _AtHand:
    """The model, known to be one that can be judged, and the chunk that it is at.

    Args:
        needs_gradient: whether attacks follow gradients of what they attack.

    Attributes:
        metadata: what the results must say of the model, once a chunk is loaded.
    """

    def __init__(self, run: RunSettings, reader: Prefetch[ChunkImages], device: torch.device, needs_gradient: bool) -> None:
        self.metadata: dict[str, str] = {}
        self._needs_gradient = needs_gradient
        self._run = run
        self._reader = reader
        self._device = device
        self._batch_size = FittingBatch(run.judge.batch_size, device)
        self._constancy: Constancy | None = None
        self._is_checked = False
        self._chunk: tuple[Chunk, ChunkImages, Prediction] | None = None

    def load(self, chunk: Chunk) -> tuple[ChunkImages, Prediction]:
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
            few = images[: max(judge.batch_size, TRIED) if judge.batch_size == wanted else judge.batch_size]
            surrogate = self._run.surrogate
            found = check_model(judge.model, judge.num_classes, few, self._needs_gradient and surrogate is None)
            if surrogate is not None:
                check_model(surrogate.model, surrogate.num_classes, few, self._needs_gradient)
            return found, None if "randomised" in found else Constancy(judge.model, few[:2], RANDOMISED_TOLERANCE)

        self.metadata, self._constancy = self.fitting(check)
        self._is_checked = True

    def _predict(self, chunk: Chunk, batch: ChunkImages) -> Prediction:
        with seeded(self._device, chunk_seed(self._run.fingerprint, "clean", chunk.start)):
            return self._run.judge.predict(batch.images, batch.labels, batch.keys)


def _check_same_model(store: RunStore, known: Task, batch: ChunkImages, clean: Prediction, metadata: Mapping[str, str]) -> None:
    """Raises ModelError unless the rows of a stored task were computed with this model."""
    if "randomised" in metadata:
        return
    rows = store.read_part(*known.part)
    stored = dict(zip(rows["index"].to_pylist(), rows["clean_margin"].to_pylist(), strict=True))
    pairs = [(stored[i], now) for i, now in zip(batch.indices, clean.margin.tolist(), strict=True)]
    scale = max(abs(before) for before, _ in pairs)
    if any(abs(before - now) > RESUME_TOLERANCE * scale for before, now in pairs):
        raise ModelError(
            f"{store.folder} holds results of another model: the same images had other logits then "
            "(its code, or a library, has changed); choose another --out, or delete that folder"
        )
