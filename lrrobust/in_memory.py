"""A model and images that are in memory: what `lrrobust eval` does with names and files.

For example:

    import lrrobust

    found = lrrobust.evaluate(model, images, labels, attacks="strong", eps=["1/255", "2/255"])
    found.summary                       # pandas: robust accuracy of each attack at each eps, with its interval
    found.checks                        # did the attacks work?
"""

from __future__ import annotations

import hashlib
import logging
import operator
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import pandas as pd
import torch
from torch import nn
from torch.nn.parameter import is_lazy

from lrrobust.attacks.custom import CustomAttack
from lrrobust.attacks.specs import Precision
from lrrobust.attacks.suite import load_suite
from lrrobust.data.tensor_images import TensorImages, check_images
from lrrobust.diagnostics.records import Diagnostic, load_diagnostics
from lrrobust.errors import ModelError
from lrrobust.evaluation.chunks import DEFAULT_BATCH_SIZE, DEFAULT_CHUNK_SIZE
from lrrobust.evaluation.judge import call_model, explain_logits
from lrrobust.frozen import frozen
from lrrobust.models import Classifier
from lrrobust.models.layer_code import code_of_layers
from lrrobust.planned_evaluation import Evaluation, NamedClassifier, plan_evaluation
from lrrobust.processes import choose_device
from lrrobust.report.notices import doubt_accuracy, warnings_with_rejections
from lrrobust.report.summary import summarise
from lrrobust.report.summary_table import IDENTITY_HEADINGS, format_row, unused_headings
from lrrobust.results import load_run
from lrrobust.run import load_named

_log = logging.getLogger(__name__)


#: What evaluations set for the whole process, such as which kernels are chosen, they set one after the other.
_one_at_a_time = threading.RLock()


@dataclass(frozen=True, eq=False, repr=False)
class Evaluated:
    """What came of an evaluation.

    Attributes:
        rows: one for each image, attack and eps, in the columns of `lrrobust.results.SCHEMA`. Attacks that look for the nearest
            adversarial image have one more, of infinite eps, for what they found at any distance.
        summary: one row for each attack and eps, and for the worst case of all attacks of a norm, in the columns of
            `lrrobust.report.summary.SUMMARY_COLUMNS`; accuracies and their intervals are fractions of all images.
        checks: one row for each check of whether the attacks worked: name, passed (None: could not be said), detail, attack
            and norm concerned. Where one failed, robust accuracies may be too high. Empty where none was asked for.
        warnings: what must be known of the model or the attacks, a sentence each; said aloud, too.
        folder: of the run, for `lrrobust report`; None where it was not kept.
    """

    rows: pd.DataFrame
    summary: pd.DataFrame
    checks: pd.DataFrame
    warnings: tuple[str, ...]
    folder: Path | None

    def __repr__(self) -> str:
        """The summary as people read it, in percent; what notebooks show."""
        rows = [format_row(row) for row in self.summary.to_dict("records")]
        return pd.DataFrame(rows).drop(columns=[*IDENTITY_HEADINGS, *unused_headings(rows)]).to_string(index=False)


def evaluate(
    model: nn.Module | Classifier,
    images: torch.Tensor,
    labels: torch.Tensor,
    *,
    attacks: str | Path | CustomAttack | Iterable[str | Path | CustomAttack] = "standard",
    eps: float | str | Iterable[float | str] | None = None,
    steps: int | None = None,
    restarts: int | None = None,
    precision: Precision | None = None,
    eot_iter: int | None = None,
    quantize: bool = False,
    save_adversarial: bool = False,
    seed: int = 0,
    classes: Sequence[str] | None = None,
    name: str | None = None,
    dataset: str = "tensor",
    chunk_size: int = DEFAULT_CHUNK_SIZE,
    batch_size: int = DEFAULT_BATCH_SIZE,
    device: torch.device | str | None = None,
    diagnostics: bool = True,
    progress: bool = True,
    out: str | Path | None = None,
) -> Evaluated:
    """Attacks a model, judges what is proposed, and checks whether the attacks worked, exactly as `lrrobust eval` does.

    The same model, images and arguments give the same result; random numbers follow from `seed`, whatever things are called.
    The model's mode, the flags of its parameters and torch's random state are as before afterwards. Of several threads one
    after the other evaluates.

    Args:
        model: images (N, C, H, W) in [0, 1] -> logits (N, K); normalises by itself.
        images: (N, C, H, W), float32 in [0, 1], N at least 1.
        labels: (N,), int64, true classes.
        attacks: one or more shipped attacks and suites, or YAML files, as `--attack` takes them, or
            `lrrobust.attacks.custom.CustomAttack`, a function of one's own.
        eps: budgets in pixel units of [0, 1] instead of the attacks', such as 0.01 or "2/255"; all attacks must share a norm.
        steps, restarts, precision, eot_iter, quantize, save_adversarial: as the options of `lrrobust eval`.
        seed: of the attacks.
        classes: names of the classes, in the order of the logits; "0", "1", ... where not given.
        name: of the model, for tables; that of the Classifier, or the class of the module, where not given. Part of a run's
            identity, as is `dataset`.
        dataset: name of the images, for tables.
        chunk_size, batch_size: images stored together, and passed through the model at once; part of a run's identity.
        device: where to compute, to which the model is moved; None: where its parameters are.
        diagnostics: whether to check afterwards if the attacks worked.
        progress: whether to show on standard error how far it is.
        out: folder under which the run gets one of its own, as `--out`: the same call goes on with it after an interruption,
            and `lrrobust report` shows it beside other runs. Another model begins another run: its parameters, the code of its
            layers and their attributes tell, but not what these call elsewhere. None: nothing is kept but what is returned.

    Raises:
        ValueError: images, labels, names or `save_adversarial` are not what they must be.
        LrRobustError: no such attack, a wrong setting, the model does not behave like a classifier, or results cannot be kept.
    """
    given = [attacks] if isinstance(attacks, (str, Path, CustomAttack)) else list(attacks)
    budgets = None if eps is None else [eps] if isinstance(eps, str) or not isinstance(eps, Iterable) else list(eps)
    if budgets is not None:
        budgets = [budget if isinstance(budget, str) else float(budget) for budget in budgets]
    seed, chunk_size, batch_size = map(operator.index, (seed, chunk_size, batch_size))
    if seed < 0 or chunk_size < 1 or batch_size < 1:
        raise ValueError(f"expected seed >= 0, chunk_size and batch_size >= 1, got {seed}, {chunk_size} and {batch_size}")
    for what in (name, dataset):
        if what is not None and not _is_name(what):
            raise ValueError(f"expected a name that can be printed, and of no file.py:factory, got {what!r}")
    if isinstance(classes, str):
        raise ValueError(f"expected the names of the classes, got the text {classes!r}")
    check_images(images, labels)
    if save_adversarial and (out is None or images.shape[1] != 3):
        raise ValueError("save_adversarial keeps images of three colours in the folder of the run: give out=, and such images")
    specs = load_suite(given, eps=budgets, steps=steps, restarts=restarts, precision=precision, eot_iter=eot_iter)
    with _one_at_a_time, _plain_torch(), TemporaryDirectory(prefix="lrrobust-") as temporary:
        named, where = _named(model, images, classes, name, device)
        real_pixels: Literal["judged", "saved"] | None = "saved" if save_adversarial else "judged" if quantize else None
        evaluation = plan_evaluation(
            named,
            TensorImages(dataset, images, labels, named.classifier.classes),
            specs,
            device=where,
            out=Path(temporary if out is None else out).expanduser(),
            seed=seed,
            chunk_size=chunk_size,
            batch_size=batch_size,
            real_pixels=real_pixels,
            asked={},
            seeds_from=hashlib.sha256(f"in memory {seed}".encode()).hexdigest(),
        )
        with _progress_of(evaluation, progress) as heard:
            evaluation.run(*heard)
        if diagnostics:
            with _diagnosing(evaluation, progress) as on_check:
                evaluation.diagnose(on_check)
        run = load_run(evaluation.folder)
        checks = load_diagnostics(run) if diagnostics else None
    summary = summarise([run])
    doubt = doubt_accuracy(summary, len(named.classifier.classes))
    warnings = (*warnings_with_rejections(run), *([f"{doubt}?"] if doubt else ()))
    for warning in warnings:
        _log.warning("%s: %s", named.name, warning)
    if checks is not None and checks.doubt is not None:
        _log.warning("%s: %s; see `checks`", named.name, checks.doubt)
    results = () if checks is None else checks.results
    found = pd.DataFrame([result.model_dump() for result in results], columns=list(Diagnostic.model_fields))
    return Evaluated(run.rows, summary, found, warnings, None if out is None else run.folder)


def _is_name(text: object) -> bool:
    return isinstance(text, str) and text.isprintable() and text.strip() != "" and ".py:" not in text


@contextmanager
def _plain_torch() -> Iterator[None]:
    """torch as a new process has it: inside torch.inference_mode() nothing could be attacked, and defaults may be others."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.inference_mode(False), torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(before)


def load_classifier(
    name: str, weights: str | None = None, *, classes: Sequence[str] | None = None, input_size: int | None = None
) -> Classifier:
    """A network with its weights, in evaluation mode, by the name that `lrrobust eval --model` takes.

    Args:
        name: such as "lr_resnet50"; the path of a file, as in "file.py:factory", runs it.
        weights: None for the model's own, else as `--weights`.
        classes: class list, for weights that carry none.
        input_size: side of the images in pixels, instead of what the weights state.

    Raises:
        LrRobustError: no such model, or its weights cannot be had, read or fitted.
    """
    classifier = load_named(name, weights, classes, input_size).classifier
    classifier.module.eval()
    return replace(classifier, name=Path(name).name if ".py:" not in name else "")


def _named(
    model: nn.Module | Classifier,
    images: torch.Tensor,
    classes: Sequence[str] | None,
    name: str | None,
    device: torch.device | str | None,
) -> tuple[NamedClassifier, torch.device]:
    """The model as evaluations take it, on the device where they compute."""
    module = model.module if isinstance(model, Classifier) else model
    if not isinstance(module, nn.Module):
        hint = ": call it in the forward of a module" if callable(module) else ""
        raise ValueError(f"expected a Classifier or a torch.nn.Module, got {type(module).__name__}{hint}")
    if any(map(is_lazy, module.parameters())):
        raise ValueError("the model has lazy layers without parameters: pass an image through it first")
    if any(parameter.is_inference() for parameter in module.parameters()):
        raise ValueError("the model was built inside torch.inference_mode(), so that it has no gradients: build it outside")
    tensors = [*module.parameters(), *module.buffers()]
    where = choose_device(str(device)) if device is not None else tensors[0].device if tensors else images.device
    if where.type not in ("cpu", "cuda"):
        raise ValueError(f"expected a model on cpu or cuda, found one on {where.type}: give device='cpu'")
    if device is not None:
        module.to(where)
    with frozen(module), torch.no_grad():
        logits = call_model(module, images[:1].to(where))
    is_tensor = isinstance(logits, torch.Tensor)
    if not is_tensor or logits.ndim != 2 or logits.shape[1] < 2:
        found = tuple(logits.shape) if is_tensor else type(logits).__name__
        raise ModelError(
            f"expected logits (N, classes) of the model, of two classes or more, got {found}{explain_logits(logits)}"
        )
    if isinstance(model, Classifier):
        if classes is not None and tuple(classes) != model.classes:
            raise ValueError("classes differ from those of the Classifier: leave them out")
        classifier = model
        if max(images.shape[-2:]) != model.input_size:
            size = " x ".join(map(str, images.shape[-2:]))
            raise ValueError(f"the Classifier takes images of {model.input_size} pixels, got {size}: resize them")
    else:
        names = tuple(map(str, range(logits.shape[1]))) if classes is None else tuple(classes)
        classifier = Classifier(module, names, input_size=max(images.shape[-2:]))
    if len(classifier.classes) != logits.shape[1]:
        raise ModelError(f"expected {len(classifier.classes)} logits, one for each class, got {logits.shape[1]}")
    return NamedClassifier(name or classifier.name or type(module).__name__, classifier, code_of_layers(module)), where


@contextmanager
def _progress_of(evaluation: Evaluation, is_shown: bool) -> Iterator[tuple[Any, ...]]:
    if not is_shown:
        yield ()
        return
    from lrrobust.console.progress import EvaluationProgress

    with EvaluationProgress(evaluation) as progress:
        yield progress.on_task, progress.on_forward, progress.on_begin


def _diagnosing(evaluation: Evaluation, is_shown: bool) -> Any:
    from lrrobust.console.progress import diagnosing

    return diagnosing(evaluation) if is_shown else nullcontext()
