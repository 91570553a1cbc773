from types import SimpleNamespace

import pytest
import torch

from lrrobust import half_precision
from lrrobust.console import EvaluationProgress, TrainingProgress


def training(precision):
    recipe = SimpleNamespace(precision=precision)
    return TrainingProgress(SimpleNamespace(recipe=recipe, device=torch.device("cpu"), step=0, steps=1, model_name="mine"))


def evaluation(precision):
    tasks = [SimpleNamespace(spec=spec, cost=1) for spec in (SimpleNamespace(), SimpleNamespace(precision=precision))]
    manifest = {"model": {"name": "mine"}}
    return EvaluationProgress(SimpleNamespace(manifest=manifest, tasks=tasks, device=torch.device("cpu")))


@pytest.mark.parametrize("build", [training, evaluation])
@pytest.mark.parametrize("precision, slowdown, is_said", [("bf16", 14.2, True), ("bf16", 1.5, False), ("float32", 14.2, False)])
def test_bf16_that_is_emulated_is_said_with_its_cure(build, precision, slowdown, is_said, monkeypatch, capsys):
    monkeypatch.setattr(half_precision, "bf16_slowdown", lambda device: slowdown)
    with build(precision):
        pass
    err = capsys.readouterr().err
    assert ("14 times as long as in float32" in err and "--precision float32" in err) == is_said
