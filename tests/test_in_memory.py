import copy
import logging
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from made_models import Function, with_random_gradients
from PIL import Image
from torch import nn

import lrrobust
from lrrobust.cli import run
from lrrobust.errors import ConfigError, ModelError, UnknownNameError
from lrrobust.models import Classifier
from lrrobust.results import load_adversarial, load_run

CLASSES = ("ant", "bee", "cat", "dog")


class Dimmed(nn.Module):
    """A layer whose code lies in this file."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, images):
        return 0.5 * self.network(images)


@pytest.fixture
def problem(linear_problem):
    return linear_problem(count=30, classes=4)


def evaluate(problem, *, model=None, images=None, labels=None, **options):
    options = {"attacks": "fgsm", "diagnostics": False, "progress": False} | options
    model, images = problem.model if model is None else model, problem.images if images is None else images
    return lrrobust.evaluate(model, images, problem.labels if labels is None else labels, **options)


def test_summary_counts_the_rows_and_equals_the_closed_form(problem):
    distances = problem.nearest("linf")
    budgets = [float(distances.quantile(q)) for q in (0.2, 0.5)]
    found = evaluate(problem, attacks=["pgd", "fgsm"], eps=budgets, name="linear")
    assert set(found.summary["attack"]) == {"pgd", "fgsm", "worst_case"} and set(found.summary["model"]) == {"linear"}
    assert found.folder is None and not len(found.checks)
    for budget in budgets:
        of_budget = found.summary[(found.summary["attack"] == "pgd") & np.isclose(found.summary["eps"], budget)]
        expected = float((distances > budget * 1.001).double().mean())
        assert float(of_budget["robust_accuracy"].iloc[0]) == pytest.approx(expected, abs=0.11)
        rows = found.rows[(found.rows["attack"] == "pgd") & np.isclose(found.rows["eps"].astype(float), budget)]
        assert 1 - rows["is_broken"].mean() == pytest.approx(float(of_budget["robust_accuracy"].iloc[0]))


def test_prints_as_people_read_it(problem):
    found = evaluate(problem, eps=["2/255"])
    heading, first, *_ = str(found).splitlines()
    assert "robust %" in heading and "dataset" not in heading and first.split()[:3] == ["fgsm", "linf", "2/255"]
    assert repr(found) == str(found)


def test_attacks_see_the_mean_of_passes_of_a_randomised_model(problem, tmp_path):
    eps = 1.5 * float(problem.nearest("linf").median())
    options = {"model": with_random_gradients(problem.model, scale=30), "attacks": "pgd", "eps": eps, "steps": 5}
    one = evaluate(problem, **options)
    mean = evaluate(problem, **options, eot_iter=40, out=tmp_path)
    robust = [found.summary["robust_accuracy"].iloc[0] for found in (one, mean)]
    assert float((problem.nearest("linf") > eps).double().mean()) <= robust[1] < robust[0] - 0.2
    assert load_run(mean.folder).manifest["attacks"][0]["eot_iter"] == 40
    assert mean.rows["backward_passes"].max() == 40 * one.rows["backward_passes"].max()
    with pytest.raises(ConfigError, match="eot_iter"):
        evaluate(problem, **options, eot_iter=0)


def test_rows_are_those_of_the_command(problem, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pixels = (255 * problem.images).round().to(torch.uint8)
    torch.save(problem.model.state_dict(), "weights.pt")
    (tmp_path / "mine.py").write_text(
        "import torch\nfrom torch import nn\nfrom lrrobust.models import Classifier\n\n\ndef build():\n"
        "    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))\n    network.load_state_dict(torch.load('weights.pt'))\n"
        f"    return Classifier(network, {CLASSES}, input_size=8)\n"
    )
    for number, (image, label) in enumerate(zip(pixels, problem.labels.tolist())):
        folder = tmp_path / "images" / CLASSES[label]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{number:02}.png")
    command = ["eval", "-m", "mine.py:build", "-d", "images", "-a", "fgsm", "--no-diagnostics", "--out", "runs"]
    assert run(command) == 0
    (folder,) = (tmp_path / "runs").iterdir()
    theirs = load_run(folder).rows
    theirs["place"] = [int(key.split("/")[1].removesuffix(".png")) for key in theirs["key"]]
    ours = evaluate(problem, images=pixels.float() / 255, classes=CLASSES).rows
    ours["place"] = ours["index"]
    both = [
        rows.sort_values(["place", "eps"])[["place", "eps", "wnid", "is_broken", "clean_margin"]] for rows in (ours, theirs)
    ]
    assert len(both[0]) == len(both[1]) == 30 * 6 and 0 < both[0]["is_broken"].mean() < 1
    for column in ("place", "eps", "wnid", "is_broken"):
        assert both[0][column].tolist() == both[1][column].tolist()
    assert both[0]["clean_margin"].to_numpy(float) == pytest.approx(both[1]["clean_margin"].to_numpy(float), rel=1e-5)


def test_checks_that_fail_are_said_aloud(problem, caplog):
    def rounded(images):
        return images + ((16 * images).round() / 16 - images).detach() - (images - images.detach()) * 0.999999

    model = nn.Sequential(Function(rounded), problem.model)
    with caplog.at_level(logging.WARNING, logger="lrrobust"):
        found = evaluate(problem, model=model, attacks="pgd", steps=2, diagnostics=True)
    failed = found.checks[found.checks["passed"].eq(False)]
    assert len(failed) and "checks failed" in caplog.text and failed["name"].iloc[0] in caplog.text
    assert failed["detail"].str.len().min() > 20


def test_a_kept_run_goes_on_and_is_reported(problem, tmp_path, monkeypatch, capsys):
    first = evaluate(problem, out=tmp_path / "runs", name="linear", dataset="squares")
    assert first.folder.name.startswith("linear-squares-n30-")
    monkeypatch.setattr("lrrobust.evaluation.engine.attack_chunk", lambda *_: pytest.fail("computed again"))
    again = evaluate(problem, out=tmp_path / "runs", name="linear", dataset="squares")
    assert again.folder == first.folder and again.rows.equals(first.rows)
    assert run(["report", str(first.folder), "--out", str(tmp_path / "report")]) == 0
    page = (tmp_path / "report" / "report.html").read_text()
    assert f"Made in Python, by no command: {first.folder.name}." in page
    capsys.readouterr()
    assert run(["check", str(tmp_path / "baseline.json"), "--update", "--run", str(first.folder)]) == 2
    assert "make it with `lrrobust eval`" in capsys.readouterr().err


def test_fingerprint_follows_images_parameters_and_seed(problem, tmp_path):
    def name(**options):
        return evaluate(problem, out=tmp_path, **options).folder.name

    brighter = problem.images.clone()
    brighter[0, 0, 0, 0] += 1e-3
    biased = copy.deepcopy(problem.model)
    with torch.no_grad():
        biased[1].bias += 1e-3
    dimmed = Dimmed(problem.model)
    names = [name(), name(seed=1), name(eps=0.01), name(images=brighter), name(model=biased), name(model=dimmed)]
    assert len(set(names)) == len(names)


def test_what_things_are_called_decides_no_number(problem):
    arguments = {"attacks": "pgd", "steps": 1, "eps": float(problem.nearest("linf").median())}
    found = [
        evaluate(problem, **arguments, **names).rows for names in ({}, {"name": "a"}, {"dataset": "b"}, {"classes": CLASSES})
    ]
    assert 0 < found[0]["is_broken"].mean() < 1
    assert all(rows["adversarial_margin"].equals(found[0]["adversarial_margin"]) for rows in found)
    assert not evaluate(problem, **arguments, seed=1).rows["adversarial_margin"].equals(found[0]["adversarial_margin"])


CELL = """
from torch import nn

class Cell(nn.Module):
    def __init__(self, network, slope=1.0):
        super().__init__()
        self.network, self.slope = network, slope

    def forward(self, images):
        return self.slope * self.network(images)
"""


def test_a_class_of_a_notebook_is_known_by_its_code(problem, tmp_path):
    def folder(cell, **options):
        namespace = {"__name__": "__main__"}
        exec(cell, namespace)
        return evaluate(problem, model=namespace["Cell"](problem.model, **options), out=tmp_path).folder

    first = folder(CELL)
    assert folder(CELL.replace("def forward", "# a comment\n    def forward")) == first
    changed = [folder(CELL.replace("self.slope *", "2 * self.slope *")), folder(CELL, slope=0.5)]
    assert len({first, *changed}) == 3


def test_defaults_of_torch_and_threads_change_nothing(problem):
    expected = evaluate(problem, attacks="apgd_ce", steps=5).rows["is_broken"]
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        assert evaluate(problem, attacks="apgd_ce", steps=5).rows["is_broken"].equals(expected)
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(before)
    model = problem.model.train()
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: evaluate(problem, model=model, attacks="apgd_ce", steps=5).rows["is_broken"], range(4)))
    assert all(each.equals(expected) for each in found) and model.training and not torch.backends.cudnn.deterministic


def test_warnings_are_kept_and_said(problem, tmp_path, caplog):
    model = nn.Sequential(problem.model, nn.Softmax(1))
    for _ in range(2):
        caplog.clear()
        found = evaluate(problem, model=model, attacks="fgsm", out=tmp_path)
        assert any("probabilities" in warning for warning in found.warnings) and "probabilities" in caplog.text


def test_an_accuracy_of_guesses_is_doubted(problem):
    sound = evaluate(problem)
    assert sound.warnings == ()
    found = lrrobust.evaluate(
        problem.model, problem.images, (problem.labels + 1) % 4, attacks="fgsm", diagnostics=False, progress=False
    )
    assert len(found.warnings) == 1 and found.warnings[0].startswith(
        "0 of 30 images are correct when clean, as guessing among 4"
    )


def test_leaves_the_model_as_it_was(problem):
    model = nn.Sequential(problem.model, nn.Dropout(0.5)).train()
    state = torch.get_rng_state()
    evaluate(problem, model=model, attacks="pgd")
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training and all(p.requires_grad and p.grad is None for p in model.parameters())


def test_grey_images(tmp_path, capsys):
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 4))
    images = torch.rand(12, 1, 6, 8, generator=generator)
    found = lrrobust.evaluate(
        model, images, model(images).argmax(1), attacks="pgd_l2", diagnostics=True, progress=False, out=tmp_path
    )
    assert found.summary["clean_accuracy"].eq(1).all() and found.summary["robust_accuracy"].min() < 1 and len(found.checks)
    assert not list((found.folder / "examples").glob("*"))
    assert run(["report", str(found.folder), "--out", str(tmp_path / "report")]) == 0
    assert "damaged" not in capsys.readouterr().err


def test_keeps_adversarial_images(problem, tmp_path):
    images = (255 * problem.images).round() / 255
    found = evaluate(problem, images=images, eps="8/255", save_adversarial=True, out=tmp_path)
    kept = [image for _, images in load_adversarial(load_run(found.folder)) for image in images]
    with torch.no_grad():
        for image in kept:
            pixels = torch.tensor(image.adversarial).permute(2, 0, 1)[None].float() / 255
            assert int(problem.model(pixels).argmax()) != int(problem.labels[image.index])
    assert len(kept) == found.rows["is_broken_quantized"].sum() > 0


def test_numbers_of_any_kind_are_budgets(problem):
    expected = evaluate(problem, eps=[0.25, 0.5]).summary["eps"].tolist()
    for eps in (np.array([0.25, 0.5], np.float32), torch.tensor([0.25, 0.5]), [Fraction(1, 4), "1/2"]):
        assert evaluate(problem, eps=eps, seed=np.int64(0)).summary["eps"].tolist() == expected
    assert evaluate(problem, eps=np.float32(0.25)).summary["eps"].tolist() == expected[:1]


def test_takes_a_classifier(problem):
    found = evaluate(problem, model=Classifier(problem.model, CLASSES, input_size=8))
    assert set(found.rows["wnid"]) <= set(CLASSES)
    with pytest.raises(ValueError, match="takes images of 16 pixels, got 8 x 8"):
        evaluate(problem, model=Classifier(problem.model, CLASSES, input_size=16))


def test_shows_progress_on_standard_error(problem, capfd):
    evaluate(problem, attacks="pgd", diagnostics=True, progress=True, name="linear")
    out, err = capfd.readouterr()
    assert not out and "linear: diagnostics" in err


class _OnMps(nn.Module):
    def buffers(self, recurse=True):
        yield SimpleNamespace(device=torch.device("mps"))


class _AsTransformersAnswer(nn.Module):
    def forward(self, images):
        return SimpleNamespace(logits=images.flatten(1))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"images": torch.zeros(30, 3, 8, 8, dtype=torch.uint8)}, ValueError, r"images.float\(\) / 255"),
        ({"classes": ("a", "b")}, ModelError, "expected 2 logits"),
        ({"name": "mine.py:build"}, ValueError, "a name"),
        ({"name": "a\nb"}, ValueError, "a name"),
        ({"save_adversarial": True}, ValueError, "give out="),
        ({"device": "tpu"}, ConfigError, "only cpu and cuda"),
        ({"model": _OnMps()}, ValueError, "cpu or cuda, found one on mps: give device='cpu'"),
        ({"eps": [0.1, "x"]}, ConfigError, "eps"),
        ({"attacks": ["pgd", "pgd_l2"], "eps": 0.1}, ConfigError, "norm"),
        ({"model": "resnet50"}, ValueError, "torch.nn.Module"),
        (
            {"model": nn.Sequential(nn.Flatten(), nn.Linear(192, 1))},
            ModelError,
            r"got \(1, 1\); if its sigmoid is the probability",
        ),
        ({"model": _AsTransformersAnswer()}, ModelError, r"got SimpleNamespace; let forward return its \.logits alone"),
        ({"model": nn.Sequential(nn.Flatten(), nn.LazyLinear(4))}, ValueError, "lazy layers .* pass an image through it first"),
        ({"model": lambda images: images}, ValueError, "got function: call it in the forward of a module"),
        ({"images": torch.zeros(3, 8, 8)}, ValueError, r"got one of \(3, 8, 8\): images\[None\]$"),
        ({"images": torch.zeros(30, 3, 8, 8).double()}, ValueError, r"float64: images\.float\(\)"),
        ({"labels": torch.zeros(30, 4, dtype=torch.int64)}, ValueError, r"labels\.argmax\(1\)$"),
        ({"labels": torch.zeros(30).int()}, ValueError, r"int32: labels\.long\(\)"),
        ({"name": 3}, ValueError, "a name"),
        ({"dataset": "a\nb"}, ValueError, "a name"),
        ({"classes": "abcd"}, ValueError, "names of the classes"),
        ({"batch_size": 0}, ValueError, "batch_size >= 1"),
        ({"batch_size": 2.5}, TypeError, "float"),
        ({"images": torch.full((30, 3, 8, 8), float("nan"))}, ValueError, r"in \[0, 1\], got nan"),
        ({"images": torch.zeros(30, 3, 8, 8, device="meta")}, ValueError, "values in a dense tensor"),
    ],
)
def test_what_does_not_fit_is_said(problem, change, error, message):
    with pytest.raises(error, match=message):
        evaluate(problem, **change)


def test_loads_the_networks_of_the_package():
    found = lrrobust.load_classifier("lr_resnet50")
    assert (
        found.name == "lr_resnet50"
        and found.weights == "TINY_IMAGENET_V1"
        and len(found.classes) == 200
        and not found.module.training
    )
    with torch.no_grad():
        assert found.module(torch.zeros(1, 3, found.input_size, found.input_size)).shape == (1, 200)
    with pytest.raises(UnknownNameError, match="lr_resnet50"):
        lrrobust.load_classifier("lr_resnet5")


def test_the_package_knows_what_it_has():
    with pytest.raises(AttributeError, match="evalute"):
        lrrobust.evalute  # noqa: B018
