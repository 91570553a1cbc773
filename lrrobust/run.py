"""From names to objects to results: what `lrrobust eval` does."""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
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
from lrrobust.data.class_lists import IMAGENET_1K, load_class_list
from lrrobust.data.evaluation_set import EvaluationSet, build_evaluation_set
from lrrobust.data.parallel_map import OnProgress
from lrrobust.data.preprocessing import Preprocessing
from lrrobust.data.sources import open_dataset
from lrrobust.data.subset import read_indices
from lrrobust.diagnostics.records import load_diagnostics, write_diagnostics
from lrrobust.diagnostics.stage import OnCheck, diagnose
from lrrobust.errors import ConfigError, StoreError
from lrrobust.evaluation.chunk_attack import Surrogate
from lrrobust.evaluation.chunks import DEFAULT_BATCH_SIZE, DEFAULT_CHUNK_SIZE
from lrrobust.evaluation.engine import ROWS_VERSION, evaluate
from lrrobust.evaluation.task_queue import Sharing
from lrrobust.evaluation.tasks import Task, plan_tasks
from lrrobust.mistakes import brief, describe_mistake
from lrrobust.models import Classifier, load_classifier, name_classes
from lrrobust.models.folding import fold_constants
from lrrobust.models.replay import replayed
from lrrobust.models.weights import state_sha256
from lrrobust.processes import choose_device
from lrrobust.provenance import describe_environment
from lrrobust.results import SCHEMA_VERSION, RunStore, fingerprint_of, identity_of, load_manifest, load_run

#: In a batch or chunk: more than any memory holds, and torch counts no further.
_MOST_IMAGES = 2**31 - 1

_log = logging.getLogger(__name__)


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
            where = " ".join(".".join(str(part) for part in mistake["loc"]).split())
            raise ConfigError(f"request: {where}: {describe_mistake(mistake)}, found {brief(mistake['input'])}") from None
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

    def find_former(self) -> list[Path]:
        """Runs beside the folder of this one, if it is new, that differ in a user's model alone: its code or its parameters.

        A factory that draws parameters without a seed makes another model each time, which goes on with no run.
        """
        is_given = bool(self.manifest["request"]["weights"])
        if is_given or self.folder.exists() or ".py:" not in self.manifest["model"]["name"]:
            return []
        fingerprint = self.manifest["fingerprint"][:10]
        beside = self.folder.parent.glob(f"{glob.escape(self.folder.name.removesuffix(fingerprint))}*")
        found = []
        for folder in sorted(beside):
            # What is no run, or damaged, is nobody's business here.
            with suppress(StoreError):
                if _fingerprint_of_rest(load_manifest(folder)) == _fingerprint_of_rest(self.manifest):
                    found.append(folder)
        return found

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


def _fingerprint_of_rest(manifest: Mapping[str, Any]) -> str:
    """As the fingerprint of an evaluation, without the code and the parameters of its model."""
    identity = identity_of(manifest)
    model = {key: value for key, value in identity["model"].items() if key not in ("state_sha256", "code_sha256")}
    return fingerprint_of({**identity, "model": model})


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
