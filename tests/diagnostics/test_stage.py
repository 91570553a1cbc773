"""The second stage of `lrrobust eval`, as a user meets it."""

import dataclasses
import functools
import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from lrrobust.attacks.specs import FgsmSpec, PgdSpec
from lrrobust.diagnostics.records import DIAGNOSTICS_FILE, load_diagnostics
from lrrobust.diagnostics.stage import CHECKS, diagnose
from lrrobust.errors import ModelError
from lrrobust.results import find_runs, load_run
from lrrobust.verdict.claims import load_claim
from lrrobust.verdict.judge import judge_claims

MODEL = """
import torch
from torch import nn
from lrrobust.models import Classifier

CLASSES = ("ant", "bee", "cat")

class Small(nn.Module):
    def __init__(self, levels=None):
        super().__init__()
        self.register_buffer("templates", torch.rand(3, 3 * 8 * 8, generator=torch.Generator().manual_seed(0)) - 0.5)
        self.weight = nn.Parameter(torch.full((), 20.0))
        self.levels = levels

    def forward(self, images):
        if self.levels:
            images = (images * self.levels).round() / self.levels
        return self.weight * (images - 0.5).flatten(1) @ self.templates.t()

def build():
    return Classifier(Small(), CLASSES, input_size=8)

def build_rounded():
    return Classifier(Small(60), CLASSES, input_size=8)
"""

CLAIM = """
statement: The rounded model is more robust.
source: nobody
treatment: model.py:build_rounded
control: model.py:build
direction: more_robust
significance: 0.05
power: 0.8
smallest_difference: 0.02
largest_clean_difference: 0.05
"""

EVAL = ("eval", "--model", "model.py:build_rounded", "--dataset", "images", "--attack", "pgd", "--eps", "4/255,8/255")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """Model files, a claim, and 60 images that the models classify correctly."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "model.py").write_text(MODEL)
    (folder / "rounded.yaml").write_text(CLAIM)
    templates = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0)).numpy()
    generator = np.random.default_rng(0)
    for name, template in zip(("ant", "bee", "cat"), templates):
        (folder / "images" / name).mkdir(parents=True)
        for i in range(20):
            pixels = 0.5 + 0.06 * (template - 0.5) + 0.1 * (generator.random((3, 8, 8)) - 0.5)
            Image.fromarray((255 * pixels.transpose(1, 2, 0)).round().astype(np.uint8)).save(
                folder / "images" / name / f"{i}.png"
            )
    return folder


@pytest.fixture
def run(run, workplace):
    return functools.partial(run, cwd=workplace)


def rows_of(folder):
    return {path.name: path.read_bytes() for path in (folder / "parts").iterdir()}


def test_eval_looks_into_its_attacks_once(run, tmp_path, caplog):
    code, out, err = run(*EVAL, "--out", tmp_path, "--no-diagnostics")
    assert code == 0, err
    assert "did the attacks work?" not in out
    (folder,) = find_runs(tmp_path)
    rows, path = rows_of(folder), folder / DIAGNOSTICS_FILE
    assert not path.exists()

    # Of a complete run only this stage is done.
    code, out, err = run(*EVAL, "--out", tmp_path)
    assert code == 0, err
    assert "did the attacks work?" in out and "FAILED" in out and "zero gradient" in out
    found = load_diagnostics(load_run(folder))
    assert {result.name for result in found.results} == {check.__name__.removeprefix("check_") for check in CHECKS}
    assert len(set(found.sample)) == 24 and set(found.sample) < set(load_run(folder).rows["index"])
    assert rows_of(folder) == rows

    before = path.read_bytes()
    code, out, err = run(*EVAL, "--out", tmp_path)
    assert code == 0 and "FAILED" in out
    assert path.read_bytes() == before

    # The same run gives the same results, also where a file was damaged.
    path.write_text("{")
    code, _, err = run(*EVAL, "--out", tmp_path)
    assert code == 0, err
    again = load_diagnostics(load_run(folder))
    assert again.model_copy(update={"wall_s": found.wall_s}) == found
    # Nor does another version stand.
    path.write_text(json.dumps({**json.loads(before), "version": 0}))
    assert load_diagnostics(load_run(folder)) is None
    assert run("report", tmp_path, "--out", tmp_path / "summary")[0] == 0
    assert "diagnostics are of version 0, and only those of version" in caplog.text
    assert run(*EVAL, "--out", tmp_path)[0] == 0
    assert load_diagnostics(load_run(folder)).version == found.version


def test_a_failed_attack_withholds_the_verdict_and_the_report_says_so(run, tmp_path):
    arguments = (*EVAL, "--model", "model.py:build", "--out", tmp_path / "runs")
    assert run(*arguments, "--no-diagnostics")[0] == 0
    claims = [load_claim("rounded.yaml")]

    def verdict():
        (result,) = judge_claims(claims, [load_run(folder) for folder in find_runs(tmp_path / "runs")]).results
        return result

    # Without a look at the attacks masked gradients pass for robustness, but that nobody looked withholds it.
    assert verdict().verdict == "inconclusive"
    failed = [safeguard for safeguard in verdict().safeguards if safeguard.passed is False]
    assert {safeguard.name for safeguard in failed} == {"attack_diagnostics", "unbounded_attack"}
    told = [each.detail for each in failed if each.name == "attack_diagnostics"]
    # The rounded one is marked by the evaluation itself, too.
    assert sum("carries no diagnostics" in each for each in told) == 2 and sum("logits was zero" in each for each in told) == 1
    assert run(*arguments)[0] == 0
    assert verdict().verdict == "inconclusive"
    assert any("zero_gradient" in reason for reason in verdict().reasons)
    of_sound = next(ref for ref in verdict().runs if ref.model == "model.py:build")
    assert {check.name: check.detail for check in of_sound.diagnostics if check.passed is not True} == {}

    code, out, err = run("report", tmp_path / "runs", "--claim", "rounded.yaml", "--out", tmp_path / "summary")
    assert code == 0, err
    assert "INCONCLUSIVE" in out
    page, text = (tmp_path / "summary" / name for name in ("report.html", "robust_accuracy.md"))
    for written in (page.read_text(), text.read_text()):
        assert "Did the attacks work?" in written
        assert "gradient it follows is zero, or too small to matter, for" in written and "FAILED" in written


def test_an_interrupt_keeps_the_rows_and_leaves_no_half_file(run, tmp_path, monkeypatch):
    def interrupt(subject):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("lrrobust.diagnostics.stage.CHECKS", (*CHECKS[:2], interrupt))
        interrupt.__name__ = "check_interrupt"
        code, _, err = run(*EVAL, "--out", tmp_path)
    assert code == 130 and "the same command goes on" in err
    (folder,) = find_runs(tmp_path)
    assert load_run(folder).is_complete
    assert sorted(path.name for path in folder.iterdir() if not path.name.startswith(".lock")) == [
        "examples",
        "manifest.json",
        "parts",
    ]
    assert run(*EVAL, "--out", tmp_path)[0] == 0
    assert load_diagnostics(load_run(folder)) is not None


def test_no_image_correct_when_clean(evaluated, sound_linear):
    spec = FgsmSpec(name="fgsm", kind="fgsm", eps=(1 / 255,))
    data, finished = evaluated(sound_linear, (spec,))
    rows = finished.rows.assign(is_clean_correct=False)
    found = diagnose(sound_linear, 5, data, (spec,), dataclasses.replace(finished, rows=rows), torch.device("cpu"))
    (result,) = found.results
    assert result.passed is None and "No image is classified correctly" in result.detail and found.sample == ()


def test_a_budget_of_nothing_leaves_nothing_to_find(evaluated, sound_linear):
    spec = PgdSpec(name="pgd", kind="pgd", norm="linf", eps=(0.0,), steps=3)
    data, finished = evaluated(sound_linear, (spec,))
    found = diagnose(sound_linear, 5, data, (spec,), finished, torch.device("cpu"))
    # Where nothing was attacked no image is at the boundary.
    assert {result.name: result.passed for result in found.results} == {
        "finite_differences": True,
        "jumps": True,
        "determinism": True,
        "float64": None,
    }


def test_an_incomplete_run_is_refused(evaluated, sound_linear):
    spec = FgsmSpec(name="fgsm", kind="fgsm", eps=(1 / 255,))
    data, finished = evaluated(sound_linear, (spec,))
    with pytest.raises(ValueError, match="expected a complete run"):
        diagnose(sound_linear, 5, data, (spec,), dataclasses.replace(finished, is_complete=False), torch.device("cpu"))


class SmallMemory(nn.Module):
    """Has room for so many images."""

    def __init__(self, model, room):
        super().__init__()
        self.model, self.room = model, room

    def forward(self, images):
        if len(images) > self.room:
            raise torch.OutOfMemoryError("tried to allocate 40 GiB")
        return self.model(images)


def test_what_does_not_fit_into_memory_is_done_in_halves(evaluated, sound_linear, caplog):
    specs = (FgsmSpec(name="fgsm", kind="fgsm", eps=(4 / 255, 8 / 255)),)
    data, finished = evaluated(sound_linear, specs)
    at_once = diagnose(sound_linear, 5, data, specs, finished, torch.device("cpu"))
    found = diagnose(SmallMemory(sound_linear, 5), 5, data, specs, finished, torch.device("cpu"), batch_size=16)
    verdicts = [[(each.name, each.attack, each.passed) for each in of.results] for of in (at_once, found)]
    assert verdicts[0] == verdicts[1] and len(verdicts[0]) == 9
    assert sum("out of memory on cpu with 16 images at once" in message for message in caplog.messages) == 1
    with pytest.raises(ModelError, match="out of memory on cpu with a single image"):
        diagnose(SmallMemory(sound_linear, 0), 5, data, specs, finished, torch.device("cpu"))


def test_the_model_and_the_random_state_are_left_as_they_were(evaluated, sound_cnn):
    spec = FgsmSpec(name="fgsm", kind="fgsm", eps=(4 / 255,))
    data, finished = evaluated(sound_cnn, (spec,))
    sound_cnn.train()
    state = torch.get_rng_state()
    told = []
    diagnose(sound_cnn, 5, data, (spec,), finished, torch.device("cpu"), on_check=lambda *at: told.append(at))
    assert sound_cnn.training and all(parameter.requires_grad for parameter in sound_cnn.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert [done for _, done, _ in told] == list(range(len(CHECKS) + 1))
