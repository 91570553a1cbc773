"""Runs of the engine on images in memory."""

import pytest
import torch

from lrrobust.evaluation.engine import evaluate, plan_tasks
from lrrobust.results import SCHEMA_VERSION, RunStore, load_run

FINGERPRINT = "0123456789abcdef"


class InMemory:
    def __init__(self, images, labels):
        self.images, self.labels = images, labels.tolist()
        self.indices = [10 * i for i in range(len(images))]
        self.keys = [f"class/{i}.png" for i in range(len(images))]
        self.wnids = [f"n{label:08d}" for label in self.labels]

    def __len__(self):
        return len(self.images)

    def load(self, positions):
        places = list(positions)
        return self.images[places].clone(), torch.tensor([self.labels[place] for place in places])


@pytest.fixture
def evaluated(tmp_path):
    """Evaluates a model on images in chunks of 5 and batches of 3, and reads the run."""

    def evaluated(model, images, labels, specs, *, num_classes=2, name="run", on_task=None, **options):
        tasks = plan_tasks(specs, len(images), 5)
        manifest = {
            "schema_version": SCHEMA_VERSION,
            "fingerprint": FINGERPRINT,
            "model": {"name": "target", "weights": None},
            "dataset": {"name": "sample", "sha256": "cd" * 32, "n": len(images)},
            "attacks": [spec.model_dump(mode="json") for spec in specs],
            "plan": {"chunk_size": 5, "parts": [list(task.part) for task in tasks]},
        }
        if options.get("real_pixels"):
            manifest["real_pixels"] = options["real_pixels"]
        with RunStore.create_or_resume(tmp_path / name, manifest) as store:
            evaluate(
                model, num_classes, InMemory(images, labels), tasks, store, fingerprint=FINGERPRINT,
                device=torch.device("cpu"), part_metadata={}, batch_size=3, on_task=on_task, **options,
            )
        return load_run(tmp_path / name)

    return evaluated
