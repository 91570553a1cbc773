"""The training loop: a recipe, images, a network; checkpoints and a learning curve."""

from __future__ import annotations

import copy
import csv
import io
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lrrobust.data.class_lists import load_class_list
from lrrobust.data.evaluation_set import EvaluationSet
from lrrobust.errors import ConfigError, DataError, WeightsError
from lrrobust.interrupts import interrupts_held_back
from lrrobust.models.registry import build_network
from lrrobust.models.weights import WeightsMetadata, fit_weights, read_weights, tensors_sha256
from lrrobust.out_of_memory import is_out_of_memory
from lrrobust.results.files import explaining, write_file
from lrrobust.results.folder_lock import FolderLock
from lrrobust.training.accuracy import accuracy_on_images
from lrrobust.training.adversarial import draw_starts, perturb
from lrrobust.training.batch_norm import share_batch_statistics
from lrrobust.training.batches import STARTS, augmented_batches, seeded
from lrrobust.training.checkpoint import read_checkpoint, write_checkpoint
from lrrobust.training.export import export_weights
from lrrobust.training.images import TrainingImages, TrainingSet
from lrrobust.training.optimizers import build_optimizer, learning_rate
from lrrobust.training.ranks import Ranks, is_left_alone
from lrrobust.training.recipe import Recipe
from lrrobust.training.recorded import RecordedPasses

#: A checkpoint at least this often, so that a kill costs little.
CHECKPOINT_INTERVAL_S = 240.0

#: Steps between two looks at numbers on the device. A GPU is given work ahead and would stand still at every look.
BURST_STEPS = {"cpu": 1, "cuda": 20}

LOG_COLUMNS = ("epoch", "step", "image_size", "learning_rate", "train_loss", "holdout_top1", "images_per_s", "wall_s")


@dataclass(frozen=True)
class Progress:
    """What the loop tells whoever watches it after each burst of steps."""

    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float
    images_per_s: float


class Training:
    """One run of a recipe in a folder; a second run of the same recipe there goes on where it stopped.

    The order of the images and all that is random about a step are functions of (seed, epoch or step) alone, so an
    interrupted run and an uninterrupted one follow the same curve. Several processes (`ranks`) share every batch:
    gradients, losses and the statistics of batch normalisation are those of the whole batch, so they too follow the
    curve of one process up to rounding, and a run may go on with another number of them. The first process alone
    writes files.

    Args:
        initial_weights: file of weights to go on from instead of fresh ones; the optimiser starts anew.
        ranks: this process among those that train together; each has the same arguments.
        stop_after: ends after so many epochs of the recipe's schedule, with its learning rates; None is its end. It is
            no part of what the training is: a later one goes on from there.
    """

    def __init__(
        self,
        model_name: str,
        recipe: Recipe,
        data: TrainingImages,
        folder: Path,
        device: str = "cpu",
        initial_weights: Path | None = None,
        ranks: Ranks = Ranks(),
        stop_after: int | None = None,
    ) -> None:
        self.epochs = recipe.last_epoch(stop_after)
        self.model_name = model_name
        self.recipe = recipe
        self.folder = folder
        self.device = torch.device(device)
        self.ranks = ranks
        ranks.rows(recipe.batch_size)  # refuses a batch that cannot be divided
        self.classes = load_class_list(recipe.classes)
        self.images_sha256 = data.sha256()
        if len(data.labels) - recipe.holdout < recipe.batch_size:
            raise DataError(
                f"{len(data.labels)} images, without the {recipe.holdout} that the recipe holds out, do not fill "
                f"a batch of {recipe.batch_size}: give more images, or a recipe with a smaller batch_size or holdout"
            )
        parts = data.split(recipe.holdout, recipe.seed)
        self.train_set, self.held_out = (part.to(self.device) for part in parts)
        self.steps_per_epoch = len(self.train_set.labels) // recipe.batch_size
        self.steps = self.steps_per_epoch * self.epochs
        # The learning rates are those of the whole schedule, wherever this training ends.
        self.schedule_steps = self.steps_per_epoch * recipe.epochs
        torch.manual_seed(recipe.seed)
        network = build_network(model_name, len(self.classes), recipe.stem)
        self.network = network.to(self.device, memory_format=torch.channels_last)
        self.initial_weights: dict[str, str] | None = None
        #: What the initial weights say of themselves, where they do.
        self.initial_metadata: WeightsMetadata | None = None
        if initial_weights is not None:
            state, metadata = read_weights(initial_weights)
            fit_weights(self.network, state, str(initial_weights))
            self.initial_weights = {
                "name": initial_weights.name if metadata is None else metadata.name,
                "sha256": tensors_sha256(state),
            }
            self.initial_metadata = metadata
        # Evaluated only, so it needs no statistics of other processes.
        self.average = copy.deepcopy(self.network).eval().requires_grad_(False)
        self._parallel: nn.Module = self.network
        if ranks.count > 1:
            share_batch_statistics(self.network)
            self._parallel = DistributedDataParallel(self.network, gradient_as_bucket_view=True)
        self._recorded = RecordedPasses(self.network, recipe.precision) if self._may_record() else None
        self.optimizer = build_optimizer(self.network, recipe)
        self.step = 0
        self.wall_s = 0.0
        self.rows: list[dict[str, Any]] = []
        self._loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        self._loss_count = 0
        # Step, loss and length of the gradient where one was first no number; a negative step means never.
        self._bad = torch.full((3,), -1.0, dtype=torch.float64, device=self.device)
        self._resume()
        # Collected once: they are changed in place alone, and a GPU would wait for the collecting at every step.
        states = [list(network.state_dict().values()) for network in (self.average, self.network)]
        self._floating = [[x for x in state if x.is_floating_point()] for state in states]
        self._counters = [[x for x in state if not x.is_floating_point()] for state in states]

    @property
    def checkpoint_path(self) -> Path:
        return self.folder / "checkpoint.pt"

    @property
    def is_held_out_unseen(self) -> bool:
        """Whether the weights that this goes on from were never trained on what is held out here, as far as is known."""
        if self.initial_weights is None:
            return True
        images = len(self.train_set.labels) + len(self.held_out.labels)
        return self.initial_metadata is not None and self.initial_metadata.has_never_seen(
            self.recipe.holdout, self.recipe.seed, images
        )

    # --- checkpoints ---------------------------------------------------------------------------------

    def _identity(self) -> dict[str, Any]:
        return {
            "model": self.model_name,
            "recipe": self.recipe.model_dump(mode="json"),
            # Which the recipe only names, as a file that may have changed.
            "classes": list(self.classes),
            "images_sha256": self.images_sha256,
            "initial_weights": self.initial_weights,
        }

    def _resume(self) -> None:
        state = read_checkpoint(self.checkpoint_path, self._identity())
        if state is None:
            return
        try:
            self._go_on_from(state)
        # torch and Python raise many types on what is not there, or not of the kind.
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            if is_out_of_memory(error):
                raise
            raise WeightsError(
                f"the checkpoint {self.checkpoint_path} does not hold what this version writes ({type(error).__name__}): "
                "go on with the version of lrrobust that wrote it, choose another --out, or delete it to start again"
            ) from None

    def _go_on_from(self, state: dict[str, Any]) -> None:
        if state["step"] > self.steps:
            raise ConfigError(
                f"{self.checkpoint_path}: expected at most step {self.steps}, the end of epoch {self.epochs}, for "
                f"--stop-after {self.epochs}, found step {state['step']}: the weights of then are gone; "
                "choose another --out to train them again, or a later epoch to go on"
            )
        self.network.load_state_dict(state["network"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.wall_s = state["step"], float(state["wall_s"])
        self.rows = [{column: row[column] for column in LOG_COLUMNS} for row in state["rows"]]
        self._loss_sum.fill_(state["loss_sum"])
        self._loss_count = state["loss_count"]
        if not 0 <= self.step - len(self.rows) * self.steps_per_epoch == self._loss_count <= self.steps_per_epoch:
            raise ValueError("steps and epochs that do not fit together")

    def save_checkpoint(self) -> None:
        """Writes everything `_resume` needs, atomically; the first process alone does."""
        if not self.ranks.is_first:
            return
        state = {
            "identity": self._identity(),
            "network": self.network.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "wall_s": self.wall_s,
            "rows": self.rows,
            "loss_sum": self._loss_sum.item(),
            "loss_count": self._loss_count,
        }
        write_checkpoint(self.checkpoint_path, state)

    # --- the loop ------------------------------------------------------------------------------------

    def run(
        self, on_step: Callable[[Progress], None] | None = None, on_epoch: Callable[[dict[str, Any]], None] | None = None
    ) -> None:
        """Trains to the end of the recipe, or of `stop_after` epochs. Whatever interrupts it, the state so far is on disk.

        Raises:
            ConfigError: a loss or gradient is no number, or another process of `ranks` has ended.
            DataError: an image that is streamed cannot be read.
            StoreError: another training is writing its folder, or the folder cannot be written.
        """
        # Processes must stop after the same step, or one waits for the other's gradients: they agree on it.
        held_back = interrupts_held_back() if self.ranks.count > 1 else nullcontext([])
        try:
            with held_back as received, self._alone():
                self._run(on_step, on_epoch, received)
        except (KeyboardInterrupt, DataError):  # a damaged image can be replaced
            self.save_checkpoint()
            raise
        except RuntimeError as error:
            if self.ranks.count == 1 or not is_left_alone(error):
                raise
            kept = "; the last checkpoint is kept" if os.path.exists(self.checkpoint_path) else ""
            raise ConfigError(
                "another of the processes that train together has ended, and says why itself: mend that and run the same "
                f"command again{kept}"
            ) from None

    def _alone(self) -> AbstractContextManager[object]:
        """Keeps other trainings out of the folder: they would write the same checkpoint and log in turns."""
        if not self.ranks.is_first:
            return nullcontext()
        with explaining("write", self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        return closing(FolderLock(self.folder, is_shared=False))

    def _run(
        self,
        on_step: Callable[[Progress], None] | None,
        on_epoch: Callable[[dict[str, Any]], None] | None,
        received: Sequence[Any],
    ) -> None:
        if self.rows:
            self._write_log()  # it may have been lost since
        last_checkpoint = time.monotonic()
        batches: Iterator[tuple[torch.Tensor, torch.Tensor]] | None = None
        while len(self.rows) < self.epochs:
            # An epoch is closed here, not after its last step: the run may have been interrupted in between.
            epoch = len(self.rows)
            if self.step >= (epoch + 1) * self.steps_per_epoch:
                batches = None
                row = self._end_epoch(epoch)
                # Not after every epoch of a GPU, which takes no longer than the writing.
                if len(self.rows) == self.epochs or time.monotonic() - last_checkpoint > CHECKPOINT_INTERVAL_S:
                    self.save_checkpoint()
                    last_checkpoint = time.monotonic()
                if on_epoch is not None:
                    on_epoch(row)
                continue
            batches = batches or self.batches(epoch)
            with interrupts_held_back():
                loss, images_per_s = self._advance(epoch, batches)
            if on_step is not None:
                on_step(Progress(epoch + 1, self.epochs, self.step, self.steps, loss, images_per_s))
            if self.ranks.total(int(bool(received)), self.device):
                raise KeyboardInterrupt
            if time.monotonic() - last_checkpoint > CHECKPOINT_INTERVAL_S:
                self.save_checkpoint()
                last_checkpoint = time.monotonic()

    def batches(self, epoch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """What is left of the batches of an epoch; see `augmented_batches`."""
        return augmented_batches(self.train_set, self.recipe, len(self.classes), epoch, self.step, self.device, self.ranks)

    def _advance(self, epoch: int, batches: Iterator[tuple[torch.Tensor, torch.Tensor]]) -> tuple[float, float]:
        """A burst of steps and its bookkeeping; the last loss, and images a second."""
        started = time.monotonic()
        count = min(BURST_STEPS[self.device.type], (epoch + 1) * self.steps_per_epoch - self.step)
        for _ in range(count):
            loss = self._train_step(*next(batches))
            self._loss_sum += loss
            self.step += 1
            self._loss_count += 1
        self._check_finite()
        last_loss = loss.item()
        elapsed_s = time.monotonic() - started
        self.wall_s += elapsed_s
        return last_loss, count * self.recipe.batch_size / elapsed_s

    def _train_step(self, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """One step of the optimiser; the loss of the whole batch, a tensor on the device."""
        images = self._attacked(images, targets)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.recipe, self.step, self.schedule_steps)
        if not self.network.training:  # half a millisecond of modules
            self.network.train()
        logits = self._passes(images)
        loss = F.cross_entropy(logits.float(), targets, label_smoothing=self.recipe.label_smoothing)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        length = nn.utils.clip_grad_norm_(self.network.parameters(), self.recipe.gradient_clip)
        loss = self.ranks.mean(loss.detach())
        self._note_bad_numbers(loss, length)
        self._check_finite_at_once()
        self.optimizer.step()
        self._update_average()
        return loss

    def _may_record(self) -> bool:
        # Several processes exchange gradients during the backward pass, and those that decode images use the GPU meanwhile.
        return self.device.type == "cuda" and self.ranks.count == 1 and isinstance(self.train_set, TrainingSet)

    def _passes(self, images: torch.Tensor) -> torch.Tensor:
        """Logits with their way back to the parameters."""
        if self._recorded is not None:
            return self._recorded(images)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.precision == "bf16"):
            return self._parallel(images)

    def _attacked(self, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        spec = self.recipe.adversarial
        if spec is None:
            return images
        starts = None
        if spec.random_start:
            # Drawn for the whole batch, so that an image's start does not depend on the number of processes.
            shape = torch.Size((self.recipe.batch_size, *images.shape[1:]))
            generator = seeded(self.recipe.seed, STARTS, self.step, device=self.device)
            starts = draw_starts(shape, spec, generator)[self.ranks.rows(self.recipe.batch_size)]
        attacked = perturb(self.network, images, targets, spec, starts, self.recipe.precision)
        return attacked.contiguous(memory_format=torch.channels_last)

    def _note_bad_numbers(self, loss: torch.Tensor, length: torch.Tensor) -> None:
        now = torch.stack([torch.full_like(self._bad[0], self.step), loss.double(), length.double()])
        is_first = (self._bad[0] < 0) & ~now.isfinite().all()
        self._bad = torch.where(is_first, now, self._bad)

    def _check_finite_at_once(self) -> None:
        # On the CPU nothing is waited for, so a bad step need not reach the weights.
        if self.device.type == "cpu":
            self._check_finite()

    def _check_finite(self) -> None:
        step, loss, length = self._bad.tolist()
        if step < 0:
            return
        what, number = ("gradient", length) if math.isfinite(loss) else ("loss", loss)
        raise ConfigError(
            f"the training {what} became {number} at step {int(step)}: "
            "lower learning_rate or gradient_clip in the recipe, or train in float32"
        )

    @torch.no_grad()
    def _update_average(self) -> None:
        # Shorter memory at the start, so that the initial weights are soon forgotten.
        decay = min(self.recipe.ema_decay, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(*self._floating, 1 - decay)
        if self._counters[0]:
            torch._foreach_copy_(*self._counters)

    def _end_epoch(self, epoch: int) -> dict[str, Any]:
        trained_s = self.wall_s - (self.rows[-1]["wall_s"] if self.rows else 0.0)
        started = time.monotonic()
        top1 = math.nan
        if len(self.held_out.labels):
            recipe = self.recipe
            top1, _ = accuracy_on_images(self.average, self.held_out, recipe.preprocessing, recipe.precision, self.ranks)
        self.wall_s += time.monotonic() - started
        row = {
            "epoch": epoch + 1,
            "step": self.step,
            "image_size": self.recipe.size_of_epoch(epoch),
            "learning_rate": learning_rate(self.recipe, self.step - 1, self.schedule_steps),
            "train_loss": self._loss_sum.item() / self._loss_count,
            "holdout_top1": top1,
            "images_per_s": self._loss_count * self.recipe.batch_size / max(1e-9, trained_s),
            "wall_s": self.wall_s,
        }
        with interrupts_held_back():
            self._loss_sum.zero_()
            self._loss_count = 0
            self.rows.append(row)
            self._write_log()
        return row

    def _write_log(self) -> None:
        if not self.ranks.is_first:
            return
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, LOG_COLUMNS)
        writer.writeheader()
        writer.writerows(self.rows)
        write_file(self.folder / "log.csv", text.getvalue().encode())

    def export(self, name: str, evaluation_sets: Sequence[EvaluationSet], note: str = "") -> Path:
        """See `export_weights`."""
        return export_weights(self, name, evaluation_sets, note)
