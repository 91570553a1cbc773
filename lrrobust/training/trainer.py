"""The training loop: a recipe, images in memory, a network; checkpoints, a learning curve, weights."""

from __future__ import annotations

import copy
import csv
import hashlib
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from lrrobust.data.class_lists import load_class_list
from lrrobust.data.evaluation_set import EvaluationSet
from lrrobust.data.subset import choose_indices
from lrrobust.errors import ConfigError, DataError, StoreError, WeightsError
from lrrobust.models.registry import build_network
from lrrobust.models.weights import (
    Accuracy,
    WeightsMetadata,
    dequantise,
    fit_weights,
    quantise,
    read_weights,
    save_weights,
    tensors_sha256,
)
from lrrobust.provenance import describe_environment
from lrrobust.training.adversarial import draw_starts, perturb
from lrrobust.training.augmentation import augment
from lrrobust.training.muon import Muon
from lrrobust.training.recipe import Recipe

#: A checkpoint at least this often, so that a kill costs little.
CHECKPOINT_INTERVAL_S = 240.0
EVALUATION_BATCH_SIZE = 100

LOG_COLUMNS = ("epoch", "step", "image_size", "learning_rate", "train_loss", "holdout_top1", "images_per_s", "wall_s")


@dataclass(frozen=True)
class TrainingSet:
    """Images in memory: uint8 (N, 3, H, H) and int64 labels (N,)."""

    images: torch.Tensor
    labels: torch.Tensor

    def sha256(self) -> str:
        digest = hashlib.sha256()
        for tensor in (self.images, self.labels):
            digest.update(tensor.contiguous().numpy().data)
        return digest.hexdigest()

    def split(self, holdout: int, seed: int) -> tuple[TrainingSet, TrainingSet]:
        """All but `holdout` images, and the class-balanced held-out ones."""
        held = torch.zeros(len(self.labels), dtype=torch.bool)
        if holdout:
            held[choose_indices(self.labels.tolist(), holdout, seed=seed, balanced=True)] = True
        return TrainingSet(self.images[~held], self.labels[~held]), TrainingSet(self.images[held], self.labels[held])


@dataclass(frozen=True)
class Progress:
    """What the loop tells whoever watches it after each step."""

    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float
    images_per_s: float


class Training:
    """One run of a recipe in a folder; a second run of the same recipe there goes on where it stopped.

    The order of the images and every random crop are functions of (seed, epoch or step) alone, so an
    interrupted run and an uninterrupted one follow the same curve.

    Args:
        initial_weights: file of weights to go on from instead of fresh ones; the optimiser starts anew.
    """

    def __init__(
        self,
        model_name: str,
        recipe: Recipe,
        data: TrainingSet,
        folder: Path,
        device: str = "cpu",
        initial_weights: Path | None = None,
    ) -> None:
        self.model_name = model_name
        self.recipe = recipe
        self.folder = folder
        self.device = torch.device(device)
        self.classes = load_class_list(recipe.classes)
        self.images_sha256 = data.sha256()
        self.train_set, self.held_out = data.split(recipe.holdout, recipe.seed)
        self.steps_per_epoch = len(self.train_set.labels) // recipe.batch_size
        if self.steps_per_epoch == 0:
            raise DataError(
                f"{len(self.train_set.labels)} training images do not fill a batch of {recipe.batch_size}: "
                "give more images or a recipe with a smaller batch_size"
            )
        self.steps = self.steps_per_epoch * recipe.epochs
        torch.manual_seed(recipe.seed)
        self.network = build_network(model_name, len(self.classes)).to(self.device, memory_format=torch.channels_last)
        self.initial_weights: dict[str, str] | None = None
        if initial_weights is not None:
            state, metadata = read_weights(initial_weights)
            fit_weights(self.network, state, str(initial_weights))
            self.initial_weights = {
                "name": initial_weights.name if metadata is None else metadata.name,
                "sha256": tensors_sha256(state),
            }
        self.average = copy.deepcopy(self.network).eval().requires_grad_(False)
        self.optimizer = build_optimizer(self.network, recipe)
        self.step = 0
        self.wall_s = 0.0
        self.rows: list[dict[str, Any]] = []
        self._loss_sum, self._loss_count = 0.0, 0
        self._resume()

    @property
    def checkpoint_path(self) -> Path:
        return self.folder / "checkpoint.pt"

    # --- checkpoints ---------------------------------------------------------------------------------

    def _identity(self) -> dict[str, Any]:
        return {
            "model": self.model_name,
            "recipe": self.recipe.model_dump(mode="json"),
            "images_sha256": self.images_sha256,
            "initial_weights": self.initial_weights,
        }

    def _resume(self) -> None:
        if not self.checkpoint_path.exists():
            return
        try:
            state = torch.load(self.checkpoint_path, map_location="cpu", weights_only=True)
            identity = state["identity"]
        except Exception as error:  # torch raises many types on damaged files
            raise WeightsError(
                f"the checkpoint {self.checkpoint_path} cannot be read ({type(error).__name__}): "
                "delete it to start again, or choose another --out"
            ) from None
        if identity != self._identity():
            raise ConfigError(
                f"{self.checkpoint_path} belongs to another training (model, recipe, images or initial weights differ): "
                "choose another --out, or delete it to start again"
            )
        self.network.load_state_dict(state["network"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.wall_s, self.rows = state["step"], state["wall_s"], state["rows"]
        self._loss_sum, self._loss_count = state["loss_sum"], state["loss_count"]

    def save_checkpoint(self) -> None:
        """Writes everything `_resume` needs, atomically."""
        state = {
            "identity": self._identity(),
            "network": self.network.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "wall_s": self.wall_s,
            "rows": self.rows,
            "loss_sum": self._loss_sum,
            "loss_count": self._loss_count,
        }
        temporary = self.folder / f".checkpoint.{os.getpid()}.tmp"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            torch.save(state, temporary)
            os.replace(temporary, self.checkpoint_path)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
            with suppress(OSError):  # as where a file takes the folder's place
                temporary.unlink()
            raise StoreError(
                f"cannot write {self.checkpoint_path}: {error}; the last checkpoint is kept, "
                "make room and run the same command again"
            ) from None

    # --- the loop ------------------------------------------------------------------------------------

    def run(
        self, on_step: Callable[[Progress], None] | None = None, on_epoch: Callable[[dict[str, Any]], None] | None = None
    ) -> None:
        """Trains to the end of the recipe. Whatever interrupts it, the state so far is on disk."""
        last_checkpoint = time.monotonic()
        try:
            while len(self.rows) < self.recipe.epochs:
                # An epoch is closed here, not after its last step: the run may have been interrupted in between.
                epoch = len(self.rows)
                if self.step >= (epoch + 1) * self.steps_per_epoch:
                    row = self._end_epoch(epoch)
                    self.save_checkpoint()
                    last_checkpoint = time.monotonic()
                    if on_epoch is not None:
                        on_epoch(row)
                    continue
                with _holding_interrupts_back():
                    loss, elapsed_s = self._advance(epoch)
                if on_step is not None:
                    rate = self.recipe.batch_size / elapsed_s
                    on_step(Progress(epoch + 1, self.recipe.epochs, self.step, self.steps, loss, rate))
                if time.monotonic() - last_checkpoint > CHECKPOINT_INTERVAL_S:
                    self.save_checkpoint()
                    last_checkpoint = time.monotonic()
        except KeyboardInterrupt:
            self.save_checkpoint()
            raise

    def _advance(self, epoch: int) -> tuple[float, float]:
        """One step and its bookkeeping; its loss and how long it took."""
        started = time.monotonic()
        loss = self._train_step(epoch)
        self.step += 1
        self._loss_sum += loss
        self._loss_count += 1
        elapsed_s = time.monotonic() - started
        self.wall_s += elapsed_s
        return loss, elapsed_s

    def _learning_rate(self, step: int) -> float:
        warmup_steps = max(1, round(self.recipe.warmup * self.steps))
        if step < warmup_steps:
            return self.recipe.learning_rate * (step + 1) / warmup_steps
        progress = (step - warmup_steps) / max(1, self.steps - warmup_steps)
        return self.recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))

    def _batch(self, epoch: int) -> tuple[torch.Tensor, torch.Tensor]:
        recipe = self.recipe
        order = torch.randperm(len(self.train_set.labels), generator=seeded(recipe.seed, 0, epoch))
        offset = (self.step % self.steps_per_epoch) * recipe.batch_size
        chosen = order[offset : offset + recipe.batch_size]
        images = augment(
            self.train_set.images[chosen],
            recipe.size_of_epoch(epoch),
            crop_scale_min=recipe.crop_scale_min,
            horizontal_flip=recipe.horizontal_flip,
            generator=seeded(recipe.seed, 1, self.step),
        )
        images = images.to(self.device).contiguous(memory_format=torch.channels_last)
        return images, self.train_set.labels[chosen].to(self.device)

    def _train_step(self, epoch: int) -> float:
        images, labels = self._batch(epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = self._learning_rate(self.step)
        if (attack := self.recipe.adversarial) is not None:
            generator = seeded(self.recipe.seed, 2, self.step)
            starts = draw_starts(images.shape, attack, generator) if attack.random_start else None
            images = perturb(self.network, images, labels, attack, starts, self.recipe.precision)
            images = images.contiguous(memory_format=torch.channels_last)
        self.network.train()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.precision == "bf16"):
            logits = self.network(images)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=self.recipe.label_smoothing)
        self._check_finite("loss", loss)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), self.recipe.gradient_clip)
        self._check_finite("gradient", norm)
        self.optimizer.step()
        self._update_average()
        return loss.item()

    def _check_finite(self, what: str, number: torch.Tensor) -> None:
        if not torch.isfinite(number):
            raise ConfigError(
                f"the training {what} became {number.item()} at step {self.step}: "
                "lower learning_rate or gradient_clip in the recipe, or train in float32"
            )

    @torch.no_grad()
    def _update_average(self) -> None:
        # Shorter memory at the start, so that the initial weights are soon forgotten.
        decay = min(self.recipe.ema_decay, (1 + self.step) / (10 + self.step))
        average, current = self.average.state_dict(), self.network.state_dict()
        floating = [key for key, tensor in average.items() if tensor.is_floating_point()]
        torch._foreach_lerp_([average[key] for key in floating], [current[key] for key in floating], 1 - decay)
        for key, tensor in average.items():
            if not tensor.is_floating_point():
                tensor.copy_(current[key])

    def _end_epoch(self, epoch: int) -> dict[str, Any]:
        started = time.monotonic()
        top1 = math.nan
        if len(self.held_out.labels):
            top1 = accuracy_on_tensors(self.average, self.held_out, self.recipe.precision)
        self.wall_s += time.monotonic() - started
        previous = self.rows[-1]["wall_s"] if self.rows else 0.0
        row = {
            "epoch": epoch + 1,
            "step": self.step,
            "image_size": self.recipe.size_of_epoch(epoch),
            "learning_rate": self._learning_rate(self.step - 1),
            "train_loss": self._loss_sum / self._loss_count,
            "holdout_top1": top1,
            "images_per_s": self._loss_count * self.recipe.batch_size / max(1e-9, self.wall_s - previous),
            "wall_s": self.wall_s,
        }
        with _holding_interrupts_back():
            self._loss_sum, self._loss_count = 0.0, 0
            self.rows.append(row)
            self._write_log()
        return row

    def _write_log(self) -> None:
        path = self.folder / "log.csv"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with path.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, LOG_COLUMNS)
                writer.writeheader()
                writer.writerows(self.rows)
        except OSError as error:
            raise StoreError(f"cannot write {path}: {error}; make room and run the same command again") from None

    # --- the result ----------------------------------------------------------------------------------

    def export(self, name: str, evaluation_sets: Sequence[EvaluationSet], note: str = "") -> Path:
        """Writes the averaged weights as int8 with their metadata, measured on the sets given.

        Args:
            name: of the weights, as in TINY_IMAGENET_V1.
            evaluation_sets: where top-1 and top-5 accuracy are measured, after rounding to int8.
            note: what the recipe does not say of this training.
        """
        stored = quantise(self.average.state_dict())
        rounded = copy.deepcopy(self.average)
        fit_weights(rounded, dequantise(stored), "the rounded state")
        accuracies = []
        for images in evaluation_sets:
            exact, _ = accuracy_on_set(self.average, images)
            top1, top5 = accuracy_on_set(rounded, images)
            accuracies.append(
                Accuracy(
                    dataset=images.name, dataset_sha256=images.sha256, n=len(images), top1=top1, top5=top5, top1_float32=exact
                )
            )
        metadata = WeightsMetadata(
            name=name,
            model=self.model_name,
            description=self.recipe.description,
            classes=self.classes,
            input_size=self.recipe.image_size,
            resize_size=self.recipe.image_size,
            interpolation="bilinear",
            recipe=self.recipe.model_dump(mode="json"),
            training={
                "images": len(self.train_set.labels),
                "steps": self.step,
                "epochs": self.recipe.epochs,
                "seed": self.recipe.seed,
                "initial_weights": self.initial_weights,
                "note": note,
                "wall_s": round(self.wall_s, 1),
                "threads": torch.get_num_threads(),
                "environment": describe_environment(self.device),
            },
            accuracy=tuple(accuracies),
        )
        path = self.folder / f"{self.model_name}-{name.lower()}.safetensors"
        save_weights(path, stored, metadata)
        return path


@contextmanager
def _holding_interrupts_back() -> Iterator[None]:
    """Delays Ctrl-C to the end of the block: half a step in a checkpoint would not be on the recipe's curve."""
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    received: list[tuple[Any, ...]] = []
    signal.signal(signal.SIGINT, lambda *arguments: received.append(arguments))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if received:
        handler(*received[0])


def seeded(*parts: int) -> torch.Generator:
    """A generator whose stream is a function of the integers given."""
    seed = 0
    for part in parts:
        seed = (seed * 1_000_003 + part + 1) % (2**63)
    return torch.Generator().manual_seed(seed)


def build_optimizer(network: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """The optimiser a recipe asks for, over all parameters of `network`."""
    groups = group_parameters(network, recipe.weight_decay)
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=recipe.learning_rate, fused=True)
    # Linear layers here are the classifier and the geometry networks, whose rows and columns are no
    # hidden features: AdamW suits them better (Jordan et al.).
    kernels = {id(m.weight) for m in network.modules() if isinstance(m, nn.Conv2d)}
    split = []
    for group in groups:
        for orthogonal in (True, False):
            chosen = [p for p in group["params"] if (id(p) in kernels) == orthogonal]
            if chosen:
                split.append({**group, "params": chosen, "orthogonal": orthogonal})
    return Muon(split, lr=recipe.learning_rate)


def group_parameters(network: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay for matrices and kernels, none for norms and biases."""
    decayed = [p for p in network.parameters() if p.ndim >= 2]
    others = [p for p in network.parameters() if p.ndim < 2]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


@torch.inference_mode()
def accuracy_on_tensors(network: nn.Module, data: TrainingSet, precision: str) -> float:
    """Top-1 accuracy as a fraction, of images in memory."""
    device = next(network.parameters()).device
    correct = 0
    for images, labels in zip(data.images.split(EVALUATION_BATCH_SIZE), data.labels.split(EVALUATION_BATCH_SIZE), strict=True):
        inputs = (images.float() / 255).to(device).contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            logits = network(inputs)
        correct += (logits.argmax(1).cpu() == labels).sum().item()
    return correct / len(data.labels)


@torch.inference_mode()
def accuracy_on_set(network: nn.Module, images: EvaluationSet) -> tuple[float, float]:
    """Top-1 and top-5 accuracy as fractions, in float32."""
    device = next(network.parameters()).device
    top1 = top5 = 0
    for start in range(0, len(images), EVALUATION_BATCH_SIZE):
        batch, labels = images.load(range(start, min(start + EVALUATION_BATCH_SIZE, len(images))))
        logits = network(batch.to(device))
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices.cpu()
        hits = best == labels.view(-1, 1)
        top1 += hits[:, 0].sum().item()
        top5 += hits.any(1).sum().item()
    return top1 / len(images), top5 / len(images)
