"""From names to objects to results: what `lrrobust eval` and `lrrobust train` do."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn

from lrrobust.attacks.specs import AttackSpec, Precision
from lrrobust.attacks.suite import load_suite
from lrrobust.config_file import brief, check_keys
from lrrobust.data.class_lists import IMAGENET_1K, load_class_list, match_classes
from lrrobust.data.evaluation_set import EvaluationSet, build_evaluation_set
from lrrobust.data.preprocessing import Preprocessing
from lrrobust.data.sources import open_dataset
from lrrobust.data.subset import read_indices
from lrrobust.data.training_images import load_training_images
from lrrobust.diagnostics.records import load_diagnostics, write_diagnostics
from lrrobust.diagnostics.stage import OnCheck, diagnose
from lrrobust.errors import ConfigError, DataError, StoreError, UnknownNameError, WeightsError
from lrrobust.evaluation.chunks import DEFAULT_BATCH_SIZE, DEFAULT_CHUNK_SIZE
from lrrobust.evaluation.engine import ROWS_VERSION, Surrogate, Task, evaluate, plan_tasks
from lrrobust.evaluation.task_queue import Sharing
from lrrobust.models import Classifier, load_classifier, name_classes
from lrrobust.models.folding import fold_constants
from lrrobust.models.registry import NETWORKS
from lrrobust.models.replay import replayed
from lrrobust.models.weights import state_sha256
from lrrobust.provenance import describe_environment
from lrrobust.results import SCHEMA_VERSION, RunStore, fingerprint_of, load_run
from lrrobust.training.averaging import average_weights, check_alike
from lrrobust.training.export import export_network
from lrrobust.training.images import StreamedImages, TrainingImages, TrainingSet
from lrrobust.training.ranks import Ranks
from lrrobust.training.recipe import Recipe, load_recipe
from lrrobust.training.trainer import Training

_log = logging.getLogger(__name__)

OnScan = Callable[[int, int], None]


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
        eps, steps, restarts, precision: replace these settings of the attacks.
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
    quantize: bool = False
    save_adversarial: bool = False
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
    """One model on one set of images under some attacks, ready to run; `manifest` says all of it.

    With a `surrogate` the attacks see that model, and `classifier` judges what they propose.
    """

    classifier: Classifier
    images: EvaluationSet
    tasks: tuple[Task, ...]
    manifest: dict[str, Any]
    folder: Path
    device: torch.device
    surrogate: Classifier | None = None

    def run(
        self,
        on_task: Callable[[Task, bool], None] | None = None,
        on_forward: Callable[[int], None] | None = None,
        on_begin: Callable[[Task, float], None] | None = None,
        sharing: Sharing | None = None,
    ) -> None:
        """Does what is missing in the folder, alone or with others; see `evaluate` for the errors."""
        environment = self.manifest["provenance"]
        part_metadata = {key: str(environment[key]) for key in ("lrrobust", "commit", "device", "processor", "threads")}
        # Not the bare name: "pandas" is a key of Parquet's own.
        part_metadata |= {f"{name}_version": str(version) for name, version in environment["versions"].items()}
        # Kernels that ask for no device start on the present one.
        on_device = torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()
        with on_device, RunStore.create_or_resume(self.folder, self.manifest, is_shared=sharing is not None) as store:
            evaluate(
                self._on_device(self.classifier),
                len(self.classifier.classes),
                self.images,
                self.tasks,
                store,
                fingerprint=self.manifest["fingerprint"],
                device=self.device,
                part_metadata=part_metadata,
                batch_size=self.manifest["plan"]["batch_size"],
                surrogate=self._surrogate(),
                real_pixels=self.manifest.get("real_pixels"),
                on_task=on_task,
                on_forward=on_forward,
                on_begin=on_begin,
                sharing=sharing,
            )

    def _on_device(self, classifier: Classifier) -> nn.Module:
        return replayed(classifier.module.to(self.device))

    def _surrogate(self) -> Surrogate | None:
        if self.surrogate is None:
            return None
        label_of = {wnid: label for label, wnid in enumerate(self.surrogate.classes)}
        labels = [label_of[wnid] for wnid in self.images.wnids]
        return Surrogate(self._on_device(self.surrogate), len(self.surrogate.classes), labels)

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
        if known is not None:
            return
        found = diagnose(
            self._on_device(self.classifier),
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

    With several models all are evaluated on the same images: those whose class every model knows, surrogates included.
    With surrogates there is one evaluation for each model and surrogate; where both are the same, a white-box one.

    Raises:
        LrRobustError: something named does not exist or does not fit; one line says what.
    """
    device = choose_device(request.device)
    if not request.models:
        raise ConfigError("no model to evaluate: name one at least")
    for option, value in (("--chunk-size", request.chunk_size), ("--batch-size", request.batch_size)):
        if value < 1:
            raise ConfigError(f"{option} must be at least 1, got {value}")
    models = _named_models("--model", request.models, "--weights", request.weights)
    surrogates = _named_models("--surrogate", request.surrogates, "--surrogate-weights", request.surrogate_weights)
    specs = load_suite(
        request.attacks, eps=request.eps, steps=request.steps, restarts=request.restarts, precision=request.precision
    )
    classes = None if request.classes is None else load_class_list(request.classes)
    indices = None if request.indices is None else read_indices(request.indices)
    loaded = {
        (name, weights): load_named(name, weights, classes, request.input_size)
        for name, weights in dict.fromkeys([*models, *surrogates])
    }
    shared = set.intersection(*(set(named.classifier.classes) for named in loaded.values()))
    for model in models:
        for surrogate in surrogates:
            _check_sizes(loaded[model], loaded[surrogate])
    first, *others = (loaded[model].classifier for model in models)
    images = build_evaluation_set(
        open_dataset(request.dataset),
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
            evaluations.append(_plan(len(evaluations), loaded[model], attacked, images, specs, request, device, command))
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


@dataclass(frozen=True)
class NamedClassifier:
    """A classifier, and the name it was asked for by."""

    name: str
    classifier: Classifier

    @cached_property
    def record(self) -> dict[str, Any]:
        """What decides its logits, JSON-ready."""
        classifier = self.classifier
        return {
            # The file a model comes from, not the way it was spelled; `code_sha256` tells files apart.
            "name": Path(self.name).name if ".py:" in self.name else self.name,
            "weights": classifier.weights,
            "state_sha256": state_sha256(classifier.module),
            "code_sha256": hashlib.sha256(_model_code(self.name, classifier)).hexdigest(),
            "classes_sha256": hashlib.sha256("\n".join(classifier.classes).encode()).hexdigest(),
            "num_classes": len(classifier.classes),
            "input_size": classifier.input_size,
            "resize_size": classifier.resize_size,
            "interpolation": classifier.interpolation,
        }

    @cached_property
    def folded(self) -> Classifier:
        """The same for running; what identifies the model is taken from the network as it was given."""
        return replace(self.classifier, module=fold_constants(self.classifier.module))


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


def _plan(
    position: int,
    model: NamedClassifier,
    surrogate: NamedClassifier | None,
    images: EvaluationSet,
    specs: Sequence[AttackSpec],
    request: EvaluationRequest,
    device: torch.device,
    command: Sequence[str],
) -> Evaluation:
    classifier = model.classifier
    tasks = tuple(plan_tasks(specs, len(images), request.chunk_size))
    # What decides the rows; not the device, not the folder.
    identity = {
        "schema_version": SCHEMA_VERSION,
        "rows_version": ROWS_VERSION,
        "model": model.record,
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
    # Keys of their own, so that other runs keep their fingerprints.
    if surrogate is not None:
        identity["surrogate"] = surrogate.record
    if request.quantize or request.save_adversarial:
        identity["real_pixels"] = "saved" if request.save_adversarial else "judged"
    fingerprint = fingerprint_of(identity)
    manifest = {
        **identity,
        "fingerprint": fingerprint,
        "created_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": list(command),
        # Of no consequence for the rows, but for what they show.
        **({"training": {"recipe": classifier.recipe, "followed": classifier.followed}} if classifier.recipe else {}),
        # In label order, so that reports can say what was predicted.
        "class_names": name_classes(classifier.classes, IMAGENET_1K),
        "request": request.record(),
        # Which of the request's evaluations this is: model by model, and surrogate by surrogate.
        "position": position,
        "provenance": describe_environment(device),
    }
    who = model.name if surrogate is None else f"{model.name}-from-{Path(surrogate.name).name}"
    slug = re.sub(r"[^A-Za-z0-9_.+]+", "-", f"{Path(who).name}-{images.name}").strip("-.")[:80]
    folder = request.out / f"{slug}-n{len(images)}-{fingerprint[:10]}"
    attacked = None if surrogate is None else surrogate.folded
    return Evaluation(model.folded, images, tasks, manifest, folder, device, attacked)


def _model_code(name: str, classifier: Classifier) -> bytes:
    """Structure of the network and, for a user's model, its code: parameters alone do not say what is computed.

    The code is its file, and those beside or below that which define a layer of the network. What these import otherwise
    is not seen here; a resumed run compares predictions besides.
    """
    # Without addresses of objects, which differ from process to process.
    structure = re.sub(r"0x[0-9a-f]+", "", repr(classifier.module)).encode()
    if ".py:" not in name:
        return structure
    path = Path(name.rsplit(":", 1)[0])
    others = [file for file in classifier.files if file != path.resolve()]
    return b"".join([structure, *(file.read_bytes() for file in (path, *others))])


def choose_device(name: str) -> torch.device:
    """The device of that name; "auto" is CUDA where there is some, else the CPU.

    Without a number, "cuda" is the first device, or the one of this process's turn where torchrun started several.
    """
    if name in ("auto", "cuda") and torch.cuda.is_available():
        return torch.device("cuda", _number(os.environ, "LOCAL_RANK", 0) % torch.cuda.device_count())
    if name == "auto":
        return torch.device("cpu")
    try:
        if name.split(":")[0] not in ("cpu", "cuda"):
            raise RuntimeError("only cpu and cuda are supported")
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = " ".join(str(error).split())[:150]
        others = "cpu or auto" if name.startswith("cuda") else "cpu, cuda or auto"
        raise ConfigError(f"--device {name!r} cannot be used here ({reason}): try {others}") from None
    return device


def choose_sharing(is_asked: bool, environ: Mapping[str, str]) -> Sharing | None:
    """How this process shares its runs with others: as torchrun has numbered them, or because it is asked to; else not.

    `LRROBUST_LEASE_S` in the environment replaces the seconds after which a silent process is taken for dead.

    Raises:
        ConfigError: the environment holds no numbers where it should.
    """
    world_size = _number(environ, "WORLD_SIZE", 1)
    if world_size == 1 and not is_asked:
        return None
    lease_s = _number(environ, "LRROBUST_LEASE_S", round(Sharing.lease_s))
    return Sharing(_number(environ, "RANK", 0), max(1, world_size), max(1, lease_s))


def _number(environ: Mapping[str, str], name: str, default: int) -> int:
    value = environ.get(name, str(default))
    if not re.fullmatch(r"[0-9]{1,9}", value):
        raise ConfigError(f"the environment variable {name} must be a number, found {brief(value)}: unset it, or correct it")
    return int(value)


# --- training ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainingRequest:
    """What is to be trained: a network of ours, a recipe, and where the images are.

    Args:
        workers: processes that decode images while the network trains, where the recipe streams them; 0 for none.
        precision: replaces that of the recipe.
        stop_after: epochs of the recipe's schedule after which the training ends; None is all.
    """

    model: str
    recipe: str
    data: str
    out: Path
    evaluate_on: tuple[str, ...] = ()
    weights_name: str = "CUSTOM"
    device: str = "auto"
    initial_weights: Path | None = None
    workers: int = 0
    precision: str | None = None
    stop_after: int | None = None


def prepare_training(
    request: TrainingRequest,
    on_scan: OnScan | None = None,
    ranks: Ranks = Ranks(),
    device: torch.device | None = None,
) -> tuple[Training, list[EvaluationSet]]:
    """Loads recipe and images; raises LrRobustError with one line where something does not fit.

    Args:
        ranks, device: of this process, as `joined_ranks` gives them; None is the device of the request.
    """
    recipe: Recipe = load_recipe(request.recipe, request.precision)
    last_size = recipe.size_of_epoch(recipe.last_epoch(request.stop_after) - 1)
    if ranks.is_first and last_size != recipe.image_size:
        _log.warning(
            "training by recipe %s ends at %d pixels, and its networks are for %d: batch statistics depend on the size, so "
            "that they may be far better there than here; a last phase of %d pixels mends that",
            recipe.name, last_size, recipe.image_size, recipe.image_size,
        )
    if request.model not in NETWORKS:
        raise UnknownNameError("network", request.model, NETWORKS)
    classes = load_class_list(recipe.classes)
    _check_weights_name(request.weights_name)
    # Measured at the end by the first process alone.
    sets = request.evaluate_on if ranks.is_first else ()
    evaluation_sets = [build_evaluation_set(open_dataset(d), classes, recipe.preprocessing) for d in sets]
    images = _open_training_images(request.data, classes, recipe, request.workers, on_scan)
    where = choose_device(request.device) if device is None else device
    training = Training(
        request.model, recipe, images, request.out, str(where), request.initial_weights, ranks, request.stop_after
    )
    return training, evaluation_sets


def average_trained(
    files: Sequence[Path],
    shares: Sequence[float],
    data: str,
    weights_name: str,
    out: Path,
    evaluate_on: Sequence[str] = (),
    note: str = "",
    on_scan: OnScan | None = None,
) -> Path:
    """Averages weights, see `average_weights`, measures what came of it, and writes it; the file's path.

    Args:
        data: the images of the last training, since what it held out is not to be looked at but to be measured on.

    Raises:
        LrRobustError: one line says what does not fit.
    """
    _check_weights_name(weights_name)
    shares = shares or [1.0] * len(files)
    last = check_alike(files, shares)[-1]
    count, digest = last.training.get("images"), last.training.get("images_sha256")
    if count is None:
        raise WeightsError(
            f"{files[-1]} does not say of how many images it was trained: give a file that `lrrobust train` wrote last"
        )
    recipe = check_keys(last.recipe, Recipe, f"the recipe in {files[-1]}")
    preprocessing = Preprocessing(last.input_size, last.resize_size, last.interpolation)
    evaluation_sets = [build_evaluation_set(open_dataset(d), last.classes, preprocessing) for d in evaluate_on]
    images = _open_training_images(data, last.classes, recipe, 0, on_scan)
    expected, found = count + recipe.holdout, len(images.labels)
    if found != expected or digest not in (None, images.sha256()):
        raise DataError(
            f"--data: expected the {expected} images that {files[-1]} was trained on, those held out among them, "
            f"found {found}{' others' * (found == expected)}: give the same as to `lrrobust train`"
        )
    images, held_out = images.split(recipe.holdout, recipe.seed)
    network, metadata = average_weights(files, shares, images)
    training = metadata.training | {"note": note, "environment": describe_environment(torch.device("cpu"))}
    metadata = metadata.model_copy(update={"name": weights_name, "training": training})
    return export_network(network, metadata, out, held_out, evaluation_sets)


def _check_weights_name(name: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9_.]+", name):
        raise ConfigError(f"--name must be letters, digits, '_' and '.', got {name!r}")


def _open_training_images(
    data: str, classes: Sequence[str], recipe: Recipe, workers: int, on_scan: OnScan | None
) -> TrainingImages:
    source = open_dataset(data)
    if recipe.loading == "memory":
        return TrainingSet(*load_training_images(source, classes, recipe.image_size, on_scan))
    if workers and not source.is_fork_safe:
        raise DataError(
            f"{source.name}: several processes cannot read a zip or a compressed tar at once: "
            "unpack it into class folders, or give --workers 0"
        )
    positions, labels = match_classes(source.wnids, classes)
    return StreamedImages(source, tuple(positions), torch.tensor(labels, dtype=torch.int64), workers)
