"""From names to objects to results: what `lrrobust eval` and `lrrobust train` do."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError

from lrrobust.attacks.specs import AttackSpec, Precision
from lrrobust.attacks.suite import load_suite
from lrrobust.config_file import brief
from lrrobust.data.class_lists import IMAGENET_1K, load_class_list
from lrrobust.data.evaluation_set import EvaluationSet, build_evaluation_set
from lrrobust.data.preprocessing import Preprocessing
from lrrobust.data.sources import open_dataset
from lrrobust.data.subset import read_indices
from lrrobust.data.training_images import load_training_images
from lrrobust.diagnostics.records import DIAGNOSTICS_VERSION, load_diagnostics, write_diagnostics
from lrrobust.diagnostics.stage import OnCheck, diagnose
from lrrobust.errors import ConfigError, StoreError, UnknownNameError
from lrrobust.evaluation.chunks import DEFAULT_BATCH_SIZE, DEFAULT_CHUNK_SIZE
from lrrobust.evaluation.engine import ROWS_VERSION, Task, evaluate, plan_tasks
from lrrobust.models import Classifier, load_classifier, name_classes
from lrrobust.models.folding import fold_constants
from lrrobust.models.registry import NETWORKS
from lrrobust.models.weights import state_sha256
from lrrobust.provenance import describe_environment
from lrrobust.results import SCHEMA_VERSION, RunStore, fingerprint_of, load_run
from lrrobust.training.recipe import Recipe, load_recipe
from lrrobust.training.trainer import Training, TrainingSet

_log = logging.getLogger(__name__)

OnScan = Callable[[int, int], None]


@dataclass(frozen=True)
class EvaluationRequest:
    """What is to be evaluated, as the user says it; None means not given.

    Args:
        models: names as `load_classifier` takes them.
        weights: one for each model, or none at all.
        attacks: names or paths of attacks and suites.
        dataset: as `open_dataset` takes it.
        classes: name or path of a class list, for weights without one.
        input_size: side of the images in pixels, instead of what the weights state.
        n, seed, balanced, indices, skip_corrupt: see `build_evaluation_set`; indices is a file.
        eps, steps, restarts, precision: replace these settings of the attacks.
        chunk_size, batch_size: images stored together, and passed through the model at once; part of
            a run's identity.
        device: "auto", "cpu", "cuda", "cuda:1", ...
        out: folder under which each run gets one of its own.
    """

    models: tuple[str, ...]
    attacks: tuple[str, ...]
    weights: tuple[str, ...] = ()
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
    chunk_size: int = DEFAULT_CHUNK_SIZE
    batch_size: int = DEFAULT_BATCH_SIZE
    device: str = "auto"
    out: Path = Path("reports/runs")

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
            where = ".".join(str(part) for part in mistake["loc"])
            raise ConfigError(f"request: {where}: {mistake['msg']}, found {brief(mistake['input'])}") from None
        return dataclasses.replace(request, **changes)


@dataclass(frozen=True)
class Evaluation:
    """One model on one set of images under some attacks, ready to run; `manifest` says all of it."""

    classifier: Classifier
    images: EvaluationSet
    tasks: tuple[Task, ...]
    manifest: dict[str, Any]
    folder: Path
    device: torch.device

    def run(
        self,
        on_task: Callable[[Task, bool], None] | None = None,
        on_forward: Callable[[int], None] | None = None,
    ) -> None:
        """Does what is missing in the folder; see `evaluate` for the errors."""
        environment = self.manifest["provenance"]
        part_metadata = {key: str(environment[key]) for key in ("lrrobust", "commit", "device", "processor", "threads")}
        # Not the bare name: "pandas" is a key of Parquet's own.
        part_metadata |= {f"{name}_version": str(version) for name, version in environment["versions"].items()}
        with RunStore.create_or_resume(self.folder, self.manifest) as store:
            evaluate(
                self.classifier.module.to(self.device),
                len(self.classifier.classes),
                self.images,
                self.tasks,
                store,
                fingerprint=self.manifest["fingerprint"],
                device=self.device,
                part_metadata=part_metadata,
                batch_size=self.manifest["plan"]["batch_size"],
                on_task=on_task,
                on_forward=on_forward,
            )


    def diagnose(self, on_check: OnCheck | None = None) -> None:
        """Looks into whether the attacks worked, unless that was done before; call it after `run`.

        See `lrrobust.diagnostics.stage.diagnose` for the errors.
        """
        run = load_run(self.folder)
        try:
            known = load_diagnostics(run)
        except StoreError as error:
            _log.warning("%s; made anew", error)
            known = None
        if known is not None and known.version == DIAGNOSTICS_VERSION:
            return
        found = diagnose(
            self.classifier.module.to(self.device),
            len(self.classifier.classes),
            self.images,
            list(dict.fromkeys(task.spec for task in self.tasks)),
            run,
            self.device,
            batch_size=self.manifest["plan"]["batch_size"],
            on_check=on_check,
        )
        write_diagnostics(run, found)


def prepare_evaluations(
    request: EvaluationRequest, command: Sequence[str], on_scan: OnScan | None = None
) -> list[Evaluation]:
    """Resolves every name and checks every input of a request, before anything long starts.

    With several models all are evaluated on the same images: those whose class every model knows.

    Raises:
        LrRobustError: something named does not exist or does not fit; one line says what.
    """
    device = choose_device(request.device)
    for option, value in (("--chunk-size", request.chunk_size), ("--batch-size", request.batch_size)):
        if value < 1:
            raise ConfigError(f"{option} must be at least 1, got {value}")
    if request.weights and len(request.weights) != len(request.models):
        raise ConfigError(
            f"--weights must be given once for each --model or not at all, "
            f"got {len(request.weights)} for {len(request.models)} models"
        )
    if len(set(zip(request.models, request.weights or [""] * len(request.models), strict=True))) < len(request.models):
        raise ConfigError("--model names the same model twice: name each once")
    specs = load_suite(
        request.attacks, eps=request.eps, steps=request.steps, restarts=request.restarts, precision=request.precision
    )
    classes = None if request.classes is None else load_class_list(request.classes)
    indices = None if request.indices is None else read_indices(request.indices)
    classifiers = []
    for position, name in enumerate(request.models):
        weights = request.weights[position] if request.weights else None
        classifiers.append(
            load_classifier(
                name, weights=weights, classes=classes, input_size=request.input_size, imagenet_classes=IMAGENET_1K
            )
        )
    shared = set(classifiers[0].classes).intersection(*(c.classes for c in classifiers))
    source = open_dataset(request.dataset)
    evaluations = []
    for position, classifier in enumerate(classifiers):
        images = build_evaluation_set(
            source,
            classifier.classes,
            Preprocessing(classifier.input_size, classifier.resize_size, classifier.interpolation),
            known_classes=shared,
            n=request.n,
            seed=request.seed,
            balanced=request.balanced,
            indices=indices,
            skip_corrupt=request.skip_corrupt,
            on_progress=on_scan,
        )
        evaluations.append(_plan(position, classifier, images, specs, request, device, command))
    return evaluations


def _plan(
    position: int,
    classifier: Classifier,
    images: EvaluationSet,
    specs: Sequence[AttackSpec],
    request: EvaluationRequest,
    device: torch.device,
    command: Sequence[str],
) -> Evaluation:
    name = request.models[position]
    tasks = tuple(plan_tasks(specs, len(images), request.chunk_size))
    # What decides the rows; not the device, not the folder.
    identity = {
        "schema_version": SCHEMA_VERSION,
        "rows_version": ROWS_VERSION,
        "model": {
            # The file a model comes from, not the way it was spelled; `code_sha256` tells files apart.
            "name": Path(name).name if ".py:" in name else name,
            "weights": classifier.weights,
            "state_sha256": state_sha256(classifier.module),
            "code_sha256": hashlib.sha256(_model_code(name, classifier)).hexdigest(),
            "classes_sha256": hashlib.sha256("\n".join(classifier.classes).encode()).hexdigest(),
            "num_classes": len(classifier.classes),
            "input_size": classifier.input_size,
            "resize_size": classifier.resize_size,
            "interpolation": classifier.interpolation,
        },
        "dataset": images.record(),
        "attacks": [spec.model_dump(mode="json", exclude={"description"}) for spec in specs],
        "plan": {
            "chunk_size": request.chunk_size,
            "batch_size": request.batch_size,
            "parts": [list(task.part) for task in tasks],
        },
        "seed": request.seed,
        "precision": "float32",
    }
    fingerprint = fingerprint_of(identity)
    manifest = {
        **identity,
        "fingerprint": fingerprint,
        "created_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": list(command),
        # In label order, so that reports can say what was predicted.
        "class_names": name_classes(classifier.classes, IMAGENET_1K),
        "request": request.record(),
        # Which of the request's models this is.
        "position": position,
        "provenance": describe_environment(device),
    }
    slug = re.sub(r"[^A-Za-z0-9_.+]+", "-", f"{Path(name).name}-{images.name}").strip("-.")[:80]
    folder = request.out / f"{slug}-n{len(images)}-{fingerprint[:10]}"
    # What identifies the model is taken above from the network as it was given.
    folded = replace(classifier, module=fold_constants(classifier.module))
    return Evaluation(folded, images, tasks, manifest, folder, device)


def _model_code(name: str, classifier: Classifier) -> bytes:
    """Structure of the network and, for a user's model, its file: parameters alone do not say what is computed.

    Code that the file imports is not seen here; a resumed run compares predictions besides.
    """
    path = Path(name.rsplit(":", 1)[0]) if ".py:" in name else None
    # Without addresses of objects, which differ from process to process.
    structure = re.sub(r"0x[0-9a-f]+", "", repr(classifier.module))
    return structure.encode() + (path.read_bytes() if path is not None else b"")


def choose_device(name: str) -> torch.device:
    """The device of that name; "auto" is the first CUDA device where there is one, else the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError(f"only cpu and cuda are supported, not {device.type}")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = " ".join(str(error).split())[:150]
        raise ConfigError(f"--device {name!r} cannot be used here ({reason}): try cpu, cuda or auto") from None
    return device


# --- training ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainingRequest:
    """What is to be trained: a network of ours, a recipe, and where the images are."""

    model: str
    recipe: str
    data: str
    out: Path
    evaluate_on: tuple[str, ...] = ()
    weights_name: str = "CUSTOM"
    device: str = "auto"
    initial_weights: Path | None = None


def prepare_training(request: TrainingRequest, on_scan: OnScan | None = None) -> tuple[Training, list[EvaluationSet]]:
    """Loads recipe and images; raises LrRobustError with one line where something does not fit."""
    recipe: Recipe = load_recipe(request.recipe)
    if request.model not in NETWORKS:
        raise UnknownNameError("network", request.model, NETWORKS)
    classes = load_class_list(recipe.classes)
    preprocessing = Preprocessing(recipe.image_size)
    if not re.fullmatch(r"[A-Za-z0-9_.]+", request.weights_name):
        raise ConfigError(f"--name must be letters, digits, '_' and '.', got {request.weights_name!r}")
    evaluation_sets = [build_evaluation_set(open_dataset(d), classes, preprocessing) for d in request.evaluate_on]
    images, labels = load_training_images(open_dataset(request.data), classes, recipe.image_size, on_scan)
    device = choose_device(request.device)
    training = Training(request.model, recipe, TrainingSet(images, labels), request.out, str(device), request.initial_weights)
    return training, evaluation_sets
