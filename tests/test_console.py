"""What accompanies long work on standard error."""

from types import SimpleNamespace

import pytest
import torch

from lrrobust import console, half_precision
from lrrobust.training.trainer import Progress


def training(precision="float32", steps=1):
    recipe = SimpleNamespace(precision=precision)
    device = torch.device("cpu")
    return console.TrainingProgress(SimpleNamespace(recipe=recipe, device=device, step=0, steps=steps, model_name="resnet50"))


def evaluation(precision):
    tasks = [SimpleNamespace(spec=spec, cost=1) for spec in (SimpleNamespace(), SimpleNamespace(precision=precision))]
    manifest = {"model": {"name": "resnet50"}}
    return console.EvaluationProgress(SimpleNamespace(manifest=manifest, tasks=tasks, device=torch.device("cpu")))


def test_long_trainings_say_where_they_are(monkeypatch, capsys):
    clock = iter([0.0, 10.0, 40.0, 50.0, 80.0])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock))
    with training(steps=100) as progress:
        for step in range(1, 5):
            progress.on_step(Progress(epoch=1, epochs=2, step=step, steps=100, loss=3.5, images_per_s=60.0))
    # At 10 and at 50 seconds too little time has passed since the line before.
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"resnet50: step {step}/100, epoch 1/2 loss 3.500 60 img/s" for step in (2, 4)]


@pytest.mark.parametrize("build", [training, evaluation])
@pytest.mark.parametrize("precision, slowdown, is_said", [("bf16", 14.2, True), ("bf16", 1.5, False), ("float32", 14.2, False)])
def test_bf16_that_is_emulated_is_said_with_its_cure(build, precision, slowdown, is_said, monkeypatch, capsys):
    monkeypatch.setattr(half_precision, "bf16_slowdown", lambda device: slowdown)
    with build(precision):
        pass
    err = capsys.readouterr().err
    assert ("14 times as long as in float32" in err and "--precision float32" in err) == is_said
