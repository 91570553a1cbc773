"""One evaluation: a model, images and attacks, what identifies it, and how it is done."""

from __future__ import annotations

import glob
import hashlib
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import nn

from lrrobust.attacks.specs import AttackSpec
from lrrobust.data.class_lists import IMAGENET_1K, match_classes
from lrrobust.diagnostics.records import load_diagnostics, why_uncounted, write_diagnostics
from lrrobust.diagnostics.stage import OnCheck, diagnose
from lrrobust.errors import StoreError
from lrrobust.evaluation.chunk_attack import Surrogate
from lrrobust.evaluation.chunk_images import Images
from lrrobust.evaluation.engine import ROWS_VERSION, evaluate
from lrrobust.evaluation.task_queue import Sharing
from lrrobust.evaluation.tasks import Task, plan_tasks
from lrrobust.models import Classifier, name_classes
from lrrobust.models.folding import fold_constants
from lrrobust.models.replay import replayed
from lrrobust.models.weights import state_sha256
from lrrobust.provenance import describe_environment
from lrrobust.results import SCHEMA_VERSION, RunStore, fingerprint_of, identity_of, load_manifest, load_run

_log = logging.getLogger(__name__)


class KnownImages(Images, Protocol):
    """Images that say what they are; `EvaluationSet` and `TensorImages` are such."""

    name: str

    @property
    def copies(self) -> int: ...

    def record(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class NamedClassifier:
    """A classifier, and the name it was asked for by; `code` is what computes it beside what its file and its structure say."""

    name: str
    classifier: Classifier
    code: bytes = b""

    @cached_property
    def record(self) -> dict[str, Any]:
        """What decides its logits, JSON-ready."""
        classifier = self.classifier
        return {
            # The file a model comes from, not the way it was spelled; `code_sha256` tells files apart.
            "name": Path(self.name).name if ".py:" in self.name else self.name,
            "weights": classifier.weights,
            "state_sha256": state_sha256(classifier.module),
            "code_sha256": hashlib.sha256(_model_code(self.name, classifier) + self.code).hexdigest(),
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


@dataclass(frozen=True)
class Evaluation:
    """One model on one set of images under some attacks, ready to run; `manifest` says all of it.

    With a `surrogate` the attacks see that model, and `classifier` judges what they propose. Random numbers follow from
    `seeds_from`, the fingerprint where it is None.
    """

    classifier: Classifier
    images: KnownImages
    tasks: tuple[Task, ...]
    manifest: dict[str, Any]
    folder: Path
    device: torch.device
    surrogate: Classifier | None = None
    seeds_from: str | None = None

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
                fingerprint=self.seeds_from or self.manifest["fingerprint"],
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
        _, labels = match_classes(self.images.wnids, self.surrogate.classes)
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
        if load_diagnostics(run) is not None:
            return
        if (said := why_uncounted(run)) is not None:
            _log.warning("%s: %s", run.folder, said)
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


def plan_evaluation(
    model: NamedClassifier,
    images: KnownImages,
    specs: Sequence[AttackSpec],
    *,
    device: torch.device,
    out: Path,
    seed: int,
    chunk_size: int,
    batch_size: int,
    surrogate: NamedClassifier | None = None,
    real_pixels: Literal["judged", "saved"] | None = None,
    asked: Mapping[str, Any],
    seeds_from: str | None = None,
) -> Evaluation:
    """Everything of an evaluation, before anything long starts.

    Args:
        model: is judged, and attacked unless there is a `surrogate`.
        images: with labels of the model.
        specs: the attacks.
        device, out: where to compute, and the folder under which the run gets one of its own; neither decides a row.
        seed, chunk_size, batch_size, surrogate, real_pixels: see `lrrobust.evaluation.engine.evaluate`; part of the run's
            identity.
        asked: how it was asked for, for the manifest: nothing of it decides a row.
        seeds_from: hexadecimal; what random numbers follow from, instead of all that decides the rows.
    """
    classifier = model.classifier
    tasks = tuple(plan_tasks(specs, len(images), chunk_size))
    # What decides the rows; not the device, not the folder.
    identity = {
        "schema_version": SCHEMA_VERSION,
        "rows_version": ROWS_VERSION,
        "model": model.record,
        "dataset": images.record(),
        "attacks": [spec.model_dump(mode="json", exclude={"description"}) for spec in specs],
        "plan": {"chunk_size": chunk_size, "batch_size": batch_size, "parts": [list(task.part) for task in tasks]},
        "seed": seed,
        "precision": "float32",
    }
    # Keys of their own, so that other runs keep their fingerprints.
    if surrogate is not None:
        identity["surrogate"] = surrogate.record
    if real_pixels is not None:
        identity["real_pixels"] = real_pixels
    fingerprint = fingerprint_of(identity)
    manifest = {
        **identity,
        "fingerprint": fingerprint,
        "created_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **asked,
        # Of no consequence for the rows, but for what they show.
        **({"training": {"recipe": classifier.recipe, "followed": classifier.followed}} if classifier.recipe else {}),
        **({"copies": copies} if (copies := images.copies) else {}),
        # In label order, so that reports can say what was predicted.
        "class_names": name_classes(classifier.classes, IMAGENET_1K),
        "provenance": describe_environment(device),
    }
    who = model.name if surrogate is None else f"{model.name}-from-{Path(surrogate.name).name}"
    slug = re.sub(r"[^A-Za-z0-9_.+]+", "-", f"{Path(who).name}-{images.name}").strip("-.")[:80]
    folder = out / f"{slug or 'run'}-n{len(images)}-{fingerprint[:10]}"
    attacked = None if surrogate is None else surrogate.folded
    return Evaluation(model.folded, images, tasks, manifest, folder, device, attacked, seeds_from)


def _fingerprint_of_rest(manifest: Mapping[str, Any]) -> str:
    """As the fingerprint of an evaluation, without the code and the parameters of its model."""
    identity = identity_of(manifest)
    model = {key: value for key, value in identity["model"].items() if key not in ("state_sha256", "code_sha256")}
    return fingerprint_of({**identity, "model": model})


def _model_code(name: str, classifier: Classifier) -> bytes:
    """Structure of the network and, for a user's model, its code: parameters alone do not say what is computed.

    The code is its file, and those that define a layer of the network. What these import otherwise is not seen here; a
    resumed run compares predictions besides.
    """
    # Without addresses of objects, which differ from process to process.
    structure = re.sub(r"0x[0-9a-f]+", "", repr(classifier.module)).encode()
    own = [Path(name.rsplit(":", 1)[0])] if ".py:" in name else []
    others = [file for file in classifier.files if file not in [path.resolve() for path in own]]
    return b"".join([structure, *(file.read_bytes() for file in (*own, *others))])
