"""From names to objects: what `lrrobust eval` evaluates."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from lrrobust.attacks.specs import Precision
from lrrobust.attacks.suite import load_suite
from lrrobust.data.class_lists import IMAGENET_1K, composed, load_class_list
from lrrobust.data.evaluation_set import build_evaluation_set
from lrrobust.data.parallel_map import OnProgress
from lrrobust.data.preprocessing import Preprocessing
from lrrobust.data.sources import open_dataset
from lrrobust.data.subset import read_indices
from lrrobust.errors import ConfigError
from lrrobust.evaluation.chunks import DEFAULT_BATCH_SIZE, DEFAULT_CHUNK_SIZE
from lrrobust.mistakes import brief, describe_mistake, dotted
from lrrobust.models import Classifier, load_classifier
from lrrobust.planned_evaluation import Evaluation, NamedClassifier, plan_evaluation
from lrrobust.processes import choose_device

#: In a batch or chunk: more than any memory holds, and torch counts no further.
_MOST_IMAGES = 2**31 - 1


@dataclass(frozen=True)
class EvaluationRequest:
    """What is to be evaluated, as the user says it; None means not given.

    Args:
        models: names as `load_classifier` takes them.
        weights: one for each model, or none at all.
        surrogates: models that are attacked in the stead of `models`, which judge the images made on them; without any,
            each model is attacked itself.
        surrogate_weights: one for each surrogate, or none at all.
        attacks: names or paths of attacks and suites.
        dataset: as `open_dataset` takes it.
        classes: name or path of a class list, for weights without one.
        input_size: side of the images in pixels, instead of what the weights state.
        n, seed, balanced, indices, skip_corrupt: see `build_evaluation_set`; indices is a file.
        eps, steps, restarts, precision, eot_iter: replace these settings of the attacks.
        quantize: judge every adversarial image a second time, rounded to 8 bits.
        save_adversarial: keep the adversarial images that outlast the rounding, which is done in any case then.
        chunk_size, batch_size: images stored together, and passed through the model at once; part of
            a run's identity.
        device: "auto", "cpu", "cuda", "cuda:1", ...
        out: folder under which each run gets one of its own.
    """

    models: tuple[str, ...]
    attacks: tuple[str, ...]
    weights: tuple[str, ...] = ()
    surrogates: tuple[str, ...] = ()
    surrogate_weights: tuple[str, ...] = ()
    dataset: str = "photos"
    classes: str | None = None
    input_size: int | None = None
    n: int | None = None
    seed: int = 0
    balanced: bool = False
    indices: Path | None = None
    skip_corrupt: bool = False
    eps: tuple[str, ...] | None = None
    steps: int | None = None
    restarts: int | None = None
    precision: Precision | None = None
    eot_iter: int | None = None
    quantize: bool = False
    save_adversarial: bool = False
    chunk_size: int = DEFAULT_CHUNK_SIZE
    batch_size: int = DEFAULT_BATCH_SIZE
    device: str = "auto"
    out: Path = Path("reports/runs")

    @property
    def real_pixels(self) -> Literal["judged", "saved"] | None:
        """As `lrrobust.evaluation.engine.evaluate` takes it."""
        return "saved" if self.save_adversarial else "judged" if self.quantize else None

    def record(self) -> dict[str, Any]:
        """The request, JSON-ready, without where it is computed and where results go."""
        record = {key: value for key, value in dataclasses.asdict(self).items() if key not in ("device", "out")}
        return json.loads(json.dumps(record, default=str))

    @classmethod
    def from_record(cls, record: Mapping[str, Any], **changes: Any) -> EvaluationRequest:
        """The request that `record` kept, with some settings replaced.

        Raises:
            ConfigError: a setting is unknown or of the wrong type.
        """
        known = {field.name for field in dataclasses.fields(cls)} - {"device", "out"}
        unknown = sorted(set(record) - known)
        if unknown:
            raise ConfigError(f"request: expected {', '.join(sorted(known))}, found {unknown[0]!r}")
        try:
            # As strict as a configuration file: "20" is no number of steps.
            request = TypeAdapter(cls).validate_json(json.dumps(record), strict=True)
        except ValidationError as error:
            mistake = error.errors(include_url=False)[0]
            where = dotted(mistake["loc"])
            raise ConfigError(f"request: {where}: {describe_mistake(mistake)}, found {brief(mistake['input'])}") from None
        return dataclasses.replace(request, **changes)


def prepare_evaluations(
    request: EvaluationRequest, command: Sequence[str], on_scan: OnProgress | None = None
) -> list[Evaluation]:
    """Resolves every name and checks every input of a request, before anything long starts.

    With several models all are evaluated on the same images: those whose class every model knows, surrogates included.
    With surrogates there is one evaluation for each model and surrogate; where both are the same, a white-box one.

    Raises:
        LrRobustError: something named does not exist or does not fit; one line says what.
    """
    device = choose_device(request.device)
    if not request.models:
        raise ConfigError("no model to evaluate: name one at least")
    for option, value in (("--chunk-size", request.chunk_size), ("--batch-size", request.batch_size)):
        if not 1 <= value <= _MOST_IMAGES:
            raise ConfigError(f"{option} must be from 1 to {_MOST_IMAGES}, got {value}")
    models = _named_models("--model", request.models, "--weights", request.weights)
    surrogates = _named_models("--surrogate", request.surrogates, "--surrogate-weights", request.surrogate_weights)
    specs = load_suite(
        request.attacks,
        eps=request.eps,
        steps=request.steps,
        restarts=request.restarts,
        precision=request.precision,
        eot_iter=request.eot_iter,
    )
    classes = None if request.classes is None else load_class_list(request.classes)
    indices = None if request.indices is None else read_indices(request.indices)
    loaded = {
        (name, weights): load_named(name, weights, classes, request.input_size)
        for name, weights in dict.fromkeys([*models, *surrogates])
    }
    shared = set.intersection(*(set(map(composed, named.classifier.classes)) for named in loaded.values()))
    for model in models:
        for surrogate in surrogates:
            _check_sizes(loaded[model], loaded[surrogate])
    first, *others = (loaded[model].classifier for model in models)
    images = build_evaluation_set(
        open_dataset(request.dataset, *(named.classifier.classes for named in loaded.values())),
        first.classes,
        _preprocessing(first),
        known_classes=shared,
        n=request.n,
        seed=request.seed,
        balanced=request.balanced,
        indices=indices,
        skip_corrupt=request.skip_corrupt,
        on_progress=on_scan,
    )
    views = [images, *(images.seen_by(other.classes, _preprocessing(other)) for other in others)]
    evaluations = []
    for model, images in zip(models, views, strict=True):
        for surrogate in surrogates or [model]:
            # However it was asked for: a model attacked itself is no transfer.
            attacked = None if loaded[surrogate].record == loaded[model].record else loaded[surrogate]
            # Which of the request's evaluations this is: model by model, and surrogate by surrogate.
            asked = {"command": list(command), "request": request.record(), "position": len(evaluations)}
            evaluations.append(
                plan_evaluation(
                    loaded[model],
                    images,
                    specs,
                    device=device,
                    out=request.out,
                    seed=request.seed,
                    chunk_size=request.chunk_size,
                    batch_size=request.batch_size,
                    surrogate=attacked,
                    real_pixels=request.real_pixels,
                    asked=asked,
                )
            )
    return evaluations


def _preprocessing(classifier: Classifier) -> Preprocessing:
    return Preprocessing(classifier.input_size, classifier.resize_size, classifier.interpolation)


def _named_models(
    option: str, names: Sequence[str], weights_option: str, weights: Sequence[str]
) -> list[tuple[str, str | None]]:
    """Names of models with the weights asked for."""
    if weights and len(weights) != len(names):
        raise ConfigError(
            f"{weights_option} must be given once for each {option} or not at all, got {len(weights)} for {len(names)} models"
        )
    named = list(zip(names, weights or [None] * len(names), strict=True))
    if len(set(named)) < len(named):
        raise ConfigError(f"{option} names the same model twice: name each once")
    return named


def load_named(
    name: str, weights: str | None = None, classes: Sequence[str] | None = None, input_size: int | None = None
) -> NamedClassifier:
    """The model of that name, see `load_classifier` for the arguments and the errors."""
    found = load_classifier(name, weights=weights, classes=classes, input_size=input_size, imagenet_classes=IMAGENET_1K)
    return NamedClassifier(name, found)


def _check_sizes(model: NamedClassifier, surrogate: NamedClassifier) -> None:
    ours, theirs = model.classifier.input_size, surrogate.classifier.input_size
    if ours != theirs:
        raise ConfigError(
            f"--surrogate {surrogate.name} takes images of {theirs} pixels, {model.name} of {ours}: what is made on one is "
            "judged on the other pixel by pixel, so give both one size with --input-size"
        )
