"""The judge: what an image is worth is decided here, from the image alone, never by the attack."""

from __future__ import annotations

import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from lrrobust.errors import ModelError
from lrrobust.evaluation.chunks import DEFAULT_BATCH_SIZE
from lrrobust.out_of_memory import is_out_of_memory
from lrrobust.threat import NORMS, Norm, ThreatModel, distance, is_in_box


@dataclass(frozen=True)
class Prediction:
    """What a model makes of images: `label` int64 (N,), `margin` float64 (N,).

    The margin is the logit of the true class minus the largest other one; below zero is misclassified.
    """

    label: torch.Tensor
    margin: torch.Tensor


@dataclass(frozen=True)
class Judgement:
    """The verdict on N proposed images.

    Attributes:
        prediction: of the proposed images.
        is_adversarial: misclassified, in the box and in the ball; bool (N,).
        is_rejected: misclassified, but outside the box or the ball, or not even numbers; bool (N,).
        distances: from the clean images, by norm, pixel units, float64 (N,).
    """

    prediction: Prediction
    is_adversarial: torch.Tensor
    is_rejected: torch.Tensor
    distances: Mapping[Norm, torch.Tensor]


class Judge:
    """Predicts and judges with one model; refuses logits it cannot trust.

    Args:
        model: images (N, 3, H, W) in [0, 1] -> logits (N, num_classes).
        num_classes: what the logits must have.
        batch_size: images passed through the model at once.
    """

    def __init__(self, model: nn.Module, num_classes: int, batch_size: int = DEFAULT_BATCH_SIZE) -> None:
        self.model = model
        self.num_classes = num_classes
        self.batch_size = batch_size

    @torch.no_grad()
    def predict(self, images: torch.Tensor, labels: torch.Tensor, keys: Sequence[str]) -> Prediction:
        """Predictions for images whose true labels and names are given.

        Raises:
            ModelError: the model returns something other than finite logits of the right shape, or
                has left evaluation mode. NaN would otherwise count as a successful attack, because
                its argmax is class 0.
        """
        logits = torch.cat([self._logits(part) for part in images.split(self.batch_size)])
        is_finite = logits.isfinite().all(1)
        if not is_finite.all():
            first = keys[int((~is_finite).nonzero()[0])]
            raise ModelError(
                f"the model returns NaN or infinite logits for {int((~is_finite).sum())} of {len(images)} images, "
                f"the first is {first}: a robust accuracy of such a model means nothing; mend the model"
            )
        check_evaluation_mode(self.model)
        true = logits.gather(1, labels.view(-1, 1)).squeeze(1)
        other = logits.scatter(1, labels.view(-1, 1), -torch.inf).amax(1)
        return Prediction(logits.argmax(1), true.double() - other.double())

    def _logits(self, images: torch.Tensor) -> torch.Tensor:
        # A copy: a model that works on the images in place would move what distances are taken from.
        logits = call_model(self.model, images.clone())
        check_logits(logits, len(images), self.num_classes)
        return logits

    def judge(
        self,
        images: torch.Tensor,
        labels: torch.Tensor,
        proposed: torch.Tensor,
        threat: ThreatModel,
        keys: Sequence[str],
    ) -> Judgement:
        """Judges proposed images (N, 3, H, W) against the clean ones."""
        if proposed.shape != images.shape:
            raise ModelError(f"an attack proposed images of shape {tuple(proposed.shape)} for {tuple(images.shape)}")
        is_allowed = is_in_box(proposed) & threat.is_in_ball(images, proposed)
        # Pixels that are not numbers are never shown to the model: its NaN would be blamed on it.
        is_number = proposed.isfinite().flatten(1).all(1)
        shown = torch.where(is_number.view(-1, 1, 1, 1), proposed, images)
        prediction = self.predict(shown, labels, keys)
        is_misclassified = prediction.label != labels
        return Judgement(
            prediction,
            is_misclassified & is_allowed,
            (is_misclassified | ~is_number) & ~is_allowed,
            {norm: distance(images, shown, norm) for norm in NORMS},
        )


def call_model(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """The model's answer, a tensor of its own; its own failures become a ModelError of one line.

    Raises:
        ModelError: the model fails on these images. Running out of memory is not its failure and stays
            what it is.
    """
    try:
        logits = model(images)
        # Some models (of other runtimes) answer into the same memory every time, and would change what they said before.
        return logits.clone() if isinstance(logits, torch.Tensor) else logits
    except KeyboardInterrupt:
        raise
    # With its exit code a model that calls sys.exit would speak for the whole evaluation.
    except BaseException as error:
        if is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:300] or _place_of(error)
        raise ModelError(
            f"the model fails on images of shape {tuple(images.shape)} in [0, 1] with {type(error).__name__}: "
            f"{reason}{_explain_import(error)}{_explain_dtype(model, images)}{_explain_colours(model, images)}"
        ) from error


def _place_of(error: BaseException) -> str:
    """Where an error that says nothing was raised."""
    *_, last = traceback.extract_tb(error.__traceback__)
    return f"{last.line or 'a line'} ({last.filename}, line {last.lineno})"


def _explain_import(error: BaseException) -> str:
    is_missing = isinstance(error, ImportError) or "ModuleNotFoundError" in str(error)
    return " (import what lies beside the model's file at its top, not in forward)" if is_missing else ""


def _explain_dtype(model: nn.Module, images: torch.Tensor) -> str:
    """What most often is the matter with parameters of another type, else nothing."""
    dtype = next((parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()), images.dtype)
    if dtype == images.dtype:
        return ""
    return f" (its parameters are {dtype}, the images {images.dtype}: call .float() on it, or convert inside forward)"


def _explain_colours(model: nn.Module, images: torch.Tensor) -> str:
    """Whether the model takes grey images: files of these are read as three equal channels."""
    if images.shape[1] == 1:
        return ""
    try:
        model(images[:, :1])
    except (Exception, SystemExit):
        return ""
    return " (it takes grey images: call it on images[:, :1] inside forward, which leaves norms as they are)"


def check_logits(logits: object, n: int, num_classes: int) -> None:
    """Raises ModelError unless logits are a floating tensor (n, num_classes)."""
    expected = f"expected logits of shape ({n}, {num_classes}), one for each class of the model"
    if not isinstance(logits, torch.Tensor):
        raise ModelError(f"the model returns {type(logits).__name__}: {expected}{explain_logits(logits)}")
    if tuple(logits.shape) != (n, num_classes) or not logits.is_floating_point():
        found = f"the model returns a tensor {tuple(logits.shape)} of {logits.dtype}"
        raise ModelError(f"{found}: {expected}{explain_logits(logits)}")


def explain_logits(logits: object) -> str:
    """What to return instead of no tensor, or where each image has one number, as under a sigmoid, else nothing."""
    if not isinstance(logits, torch.Tensor):
        # As models of Hugging Face's transformers answer.
        what = "its .logits" if isinstance(getattr(logits, "logits", None), torch.Tensor) else "them"
        return f"; let forward return {what} alone"
    if not logits.is_floating_point() or tuple(logits.shape[1:]) not in ((), (1,)):
        return ""
    return "; if its sigmoid is the probability of the second of two classes, return torch.stack([0 * z, z], 1) of z (N,)"


#: Logits of an image that decide its class and how surely; others may be -1e9, as of classes that are masked.
_LEADING = 3


def logit_scale(logits: torch.Tensor) -> float:
    """What differences of logits are compared with: classes are as sure at any scale, and with any number added to all logits.

    It is the size of the largest leading logit, or how far it lies above the lowest of its image where that is less.
    """
    leading = logits.topk(min(_LEADING, logits.shape[1]), dim=1).values
    height = leading - logits.amin(dim=1, keepdim=True)
    return max(min(float(leading.abs().max()), float(height.max())), torch.finfo(logits.dtype).tiny)


def gap(logits: torch.Tensor, others: torch.Tensor) -> float:
    """The largest difference of two answers to the same images, among the leading logits of either."""
    return float(gaps(logits, others).max())


def gaps(logits: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """The same of each image, (N,)."""
    count = min(_LEADING, logits.shape[1])
    places = torch.cat([each.topk(count, dim=1).indices for each in (logits, others)], 1)
    return (logits - others).gather(1, places).abs().amax(1)


def check_evaluation_mode(model: nn.Module) -> None:
    """Raises ModelError when a part of the model is in training mode, where batches change predictions."""
    for name, module in model.named_modules():
        if getattr(module, "training", False):
            raise ModelError(
                f"the model's part {name or 'itself'!r} is in training mode during evaluation: "
                "do not call .train() inside forward, and let .eval() reach it (a method `train` of its own may not)"
            )
