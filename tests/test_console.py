"""What is shown without a terminal, as in the log of a batch job."""

from types import SimpleNamespace

from lrrobust import console
from lrrobust.training.trainer import Progress


def test_long_trainings_say_where_they_are(monkeypatch, capsys):
    clock = iter([0.0, 10.0, 40.0, 50.0, 80.0])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock))
    with console.TrainingProgress(SimpleNamespace(step=0, steps=100, model_name="resnet50")) as progress:
        for step in range(1, 5):
            progress.on_step(Progress(epoch=1, epochs=2, step=step, steps=100, loss=3.5, images_per_s=60.0))
    # At 10 and at 50 seconds too little time has passed since the line before.
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"resnet50: step {step}/100, epoch 1/2 loss 3.500 60 img/s" for step in (2, 4)]
