"""What is shown while something works, without a terminal, as in the log of a batch job."""

import io
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from lrrobust import half_precision
from lrrobust.console import progress as shown_progress
from lrrobust.console import streams
from lrrobust.console.progress import EvaluationProgress, TrainingProgress
from lrrobust.training.trainer import Progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that moves when told to, and what is shown on standard error, which is no terminal."""
    clock = SimpleNamespace(now=0.0, shown=io.StringIO())
    monkeypatch.setattr(shown_progress, "time", SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setattr(streams, "notices", Console(file=clock.shown, width=200))
    return clock


def progress_over(*costs):
    tasks = [SimpleNamespace(cost=cost, spec=SimpleNamespace(name=name)) for name, cost in costs]
    manifest = {"model": {"name": "tiny"}}
    made = SimpleNamespace(tasks=tasks, manifest=manifest, folder="runs/tiny", device=torch.device("cpu"))
    return EvaluationProgress(made), tasks


def last_line(clock):
    return clock.shown.getvalue().splitlines()[-1]


def passes(progress, clock, count, each_s=1.0):
    for _ in range(count):
        clock.now += each_s
        progress.on_forward(1)


def test_time_left_is_a_bound_at_first_and_an_estimate_once_a_part_is_done(clock):
    progress, tasks = progress_over(("pgd", 100), ("pgd", 100), ("pgd", 100))
    with progress:
        # What comes before the first pass, such as compiling, says nothing of the speed.
        passes(progress, clock, 1, each_s=500.0)
        passes(progress, clock, 40)
        assert last_line(clock) == "tiny: 0/3 parts, 531 s, at most 4 min left"
        # The part needed 50 of the 100 passes it may need: so will the others.
        passes(progress, clock, 10)
        progress.on_task(tasks[0], True)
        passes(progress, clock, 30)
        assert last_line(clock) == "tiny: 1/3 parts, 561 s, about 89 s left"
        # Within a part it falls as well.
        passes(progress, clock, 30)
        assert last_line(clock) == "tiny: 1/3 parts, 591 s, about 59 s left"


def test_one_attack_says_nothing_of_another(clock):
    progress, tasks = progress_over(("fgsm", 10), ("pgd", 100), ("fgsm", 10), ("pgd", 100))
    with progress:
        passes(progress, clock, 2)
        progress.on_task(tasks[0], True)
        passes(progress, clock, 29)
        # Of 200 passes of pgd 29 are made; fgsm needs 1 of 10.
        assert last_line(clock) == "tiny: 1/4 parts, 30 s, at most 3 min left"
        progress.on_task(tasks[1], True)
        passes(progress, clock, 30)
        assert last_line(clock) == "tiny: 2/4 parts, 60 s, about 1 s left"


def test_the_bound_counts_images_that_are_attacked(clock):
    progress, tasks = progress_over(("pgd", 100), ("square", 1000))
    with progress:
        # A fifth of the images is correct when clean, ...
        progress.on_begin(tasks[0], 0.2)
        passes(progress, clock, 11)
        progress.on_task(tasks[0], True)
        # ... and pgd left few of them.
        progress.on_begin(tasks[1], 0.11)
        passes(progress, clock, 30)
        # (0.2 * 100 + 0.11 * 1000) / 1100 of square's 1000 passes, less the 19 made until then.
        assert last_line(clock) == "tiny: 1/2 parts, 30 s, at most 99 s left"


def test_parts_without_anything_to_attack_say_nothing(clock):
    progress, tasks = progress_over(("pgd", 100), ("pgd", 100))
    with progress:
        progress.on_task(tasks[0], True)
        passes(progress, clock, 32)
        assert last_line(clock).endswith(", at most 71 s left")


def test_a_part_that_needs_more_than_those_before_it_has_time_left(clock):
    progress, tasks = progress_over(("pgd", 100), ("pgd", 100), ("pgd", 100))
    with progress:
        progress.on_begin(tasks[0], 0.8)
        passes(progress, clock, 21)
        progress.on_task(tasks[0], True)
        progress.on_begin(tasks[1], 0.8)
        passes(progress, clock, 40)
        # The first took 20 (and the clock starts a pass late): the second may take 40 more, the third probably 20.
        assert last_line(clock) == "tiny: 1/3 parts, 60 s, at most 61 s left"
        progress.on_task(tasks[1], True)
        progress.on_begin(tasks[2], 0.8)
        passes(progress, clock, 60)
        # The last is 59 passes into its 80.
        assert last_line(clock) == "tiny: 2/3 parts, 120 s, at most 21 s left"


def test_parts_of_others_shorten_the_time_left(clock):
    progress, tasks = progress_over(("pgd", 100), ("pgd", 100), ("pgd", 100), ("pgd", 100))
    with progress:
        passes(progress, clock, 51)
        progress.on_task(tasks[0], True)
        progress.on_task(tasks[1], False)
        passes(progress, clock, 31)
        # 91 passes are left, of which others make half.
        assert last_line(clock) == "tiny: 2/4 parts, 60 s, about 46 s left"


def test_stored_parts_say_that_a_run_goes_on(clock):
    progress, tasks = progress_over(("pgd", 100), ("pgd", 100))
    with progress:
        progress.on_task(tasks[0], False)
        passes(progress, clock, 60)
    first, *_, last = clock.shown.getvalue().splitlines()
    assert (first, last) == ("going on with runs/tiny", "tiny: 1/2 parts, 60 s, at most 41 s left")


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0 s"), (99, "99 s"), (125, "2 min"), (5990, "100 min"), (9000, "2.5 h")])
def test_durations_are_as_exact_as_estimates(seconds, text):
    assert shown_progress._round_duration(seconds) == text


def training(precision="float32", steps=1):
    recipe = SimpleNamespace(precision=precision)
    device = torch.device("cpu")
    return TrainingProgress(SimpleNamespace(recipe=recipe, device=device, step=0, steps=steps, model_name="resnet50"))


def evaluation(precision):
    specs = SimpleNamespace(name="pgd"), SimpleNamespace(name="pgd_bf16", precision=precision)
    tasks = [SimpleNamespace(spec=spec, cost=1) for spec in specs]
    manifest = {"model": {"name": "resnet50"}}
    return EvaluationProgress(SimpleNamespace(manifest=manifest, tasks=tasks, device=torch.device("cpu")))


def test_long_trainings_say_where_they_are(monkeypatch, capsys):
    clock = iter([0.0, 10.0, 40.0, 50.0, 80.0])
    monkeypatch.setattr(shown_progress.time, "monotonic", lambda: next(clock))
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


NAME = "m.py:b: [red]x[/red]"


def test_bars_show_names_as_they_are(monkeypatch):
    shown = io.StringIO()
    monkeypatch.setattr(streams, "notices", Console(file=shown, width=200, force_terminal=True, color_system=None))
    with shown_progress.scanning(NAME) as on_read:
        on_read(1, 2)
    assert NAME in shown.getvalue()
