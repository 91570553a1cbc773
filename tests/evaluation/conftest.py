"""Runs of the engine on images in memory."""

import pytest
import torch
from made_models import ImagesInMemory

from lrrobust.attacks.build import Attack, Effort
from lrrobust.evaluation import chunk_attack
from lrrobust.evaluation.engine import evaluate
from lrrobust.evaluation.tasks import plan_tasks
from lrrobust.results import SCHEMA_VERSION, RunStore, load_run

FINGERPRINT = "0123456789abcdef"


@pytest.fixture
def in_memory():
    """Makes an evaluation set of images (N, 3, H, W) and labels (N,)."""
    return ImagesInMemory


@pytest.fixture
def problem(linear_problem):
    return linear_problem(12, 3)


@pytest.fixture
def images(problem):
    return ImagesInMemory(problem.images, problem.labels)


@pytest.fixture
def run():
    """Evaluates a model on images in memory, or goes on with that; the rows."""

    def run(model, num_classes, images, specs, folder, chunk_size=5, batch_size=3, **options):
        tasks = plan_tasks(specs, len(images), chunk_size)
        manifest = {
            "schema_version": SCHEMA_VERSION,
            "fingerprint": FINGERPRINT,
            "model": {"name": "target", "weights": None},
            "dataset": {"name": "sample", "sha256": "cd" * 32, "n": len(images)},
            "attacks": [spec.model_dump(mode="json") for spec in specs],
            "plan": {"chunk_size": chunk_size, "parts": [list(task.part) for task in tasks]},
            "provenance": {},
        }
        if options.get("real_pixels"):
            manifest["real_pixels"] = options["real_pixels"]
        with RunStore.create_or_resume(folder, manifest) as store:
            evaluate(
                model,
                num_classes,
                images,
                tasks,
                store,
                fingerprint=FINGERPRINT,
                device=torch.device("cpu"),
                part_metadata={"device": "cpu"},
                batch_size=batch_size,
                **options,
            )
            return store.read_rows()

    return run


@pytest.fixture
def evaluated(tmp_path, run):
    """As `run`, of images (N, 3, H, W) and labels (N,), into a folder of that name; the run as it is loaded."""

    def evaluated(model, images, labels, specs, *, num_classes=2, name="run", **options):
        run(model, num_classes, ImagesInMemory(images, labels), specs, tmp_path / name, **options)
        return load_run(tmp_path / name)

    return evaluated


@pytest.fixture
def attack_is(monkeypatch):
    """Replaces every attack by a function of (model, images, labels), asked at each budget for images that stand."""

    def replace(function):
        class Replacement(Attack):
            def __call__(self, model, images, labels, *, batch_size, claim, draw, levels):
                passes = torch.zeros(len(self.ladder), len(images), dtype=torch.int64)
                rows = list(range(len(images)))
                for eps in self.ladder:
                    if rows:
                        is_broken = claim(
                            rows, function(model, images[rows], labels[rows]), [eps] * len(rows), [True] * len(rows)
                        )
                        rows = [row for row, broken in zip(rows, is_broken, strict=True) if not broken]
                return Effort(passes, passes, 0)

        monkeypatch.setattr(chunk_attack, "Attack", Replacement)

    return replace
