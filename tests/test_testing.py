import re

import pytest
import torch
from made_models import Function
from torch import nn

from lrrobust.errors import ConfigError, ModelError, UnknownNameError
from lrrobust.models import Classifier
from lrrobust.testing import assert_robust


@pytest.fixture
def problem(linear_problem):
    return linear_problem(count=30, classes=4)


def test_equals_the_closed_form(problem):
    # Cross-entropy does not always lead to the nearest of the other classes, so a few images may withstand beyond it.
    distances = problem.nearest("linf")
    eps = float(distances.median())
    expected = float((distances > eps * 1.001).double().mean())
    found = assert_robust(*problem, eps=eps, at_least=0.0)
    assert found == pytest.approx(expected, abs=0.11)
    assert 0 < found < 1
    assert assert_robust(*problem, eps=float(distances.min()) * 0.9, at_least=1.0) == 1.0
    with pytest.raises(AssertionError):
        assert_robust(*problem, eps=float(distances.max()) * 3, at_least=0.01)


def test_failure_names_numbers_and_images(problem):
    eps = float(problem.nearest("linf").sort().values[10])
    labels = problem.labels.clone()
    labels[3] = (labels[3] + 1) % 4  # wrong when clean counts as broken
    with pytest.raises(AssertionError) as failure:
        assert_robust(problem.model, problem.images, labels, eps=eps, at_least=0.99)
    message = str(failure.value)
    assert re.match(r"robust accuracy 0\.\d+ is below 0\.99: \d+ of 30 images withstand pgd \(linf\) at eps", message)
    assert "clean accuracy 0.9667" in message
    broken = [int(place) for place in message.rpartition("broken: ")[2].split(", ")]
    assert 3 in broken
    assert len(broken) == 30 - int(re.search(r"(\d+) of 30", message).group(1))
    assert failure.traceback[-1].frame.code.name == "assert_robust"


def test_under_a_suite_any_attack_breaks(problem, tmp_path):
    (tmp_path / "two.yaml").write_text("kind: suite\nattacks: [fgsm, pgd]\n")
    eps = float(problem.nearest("linf").median())
    arguments = tuple(problem)
    alone = [assert_robust(*arguments, attack=name, eps=eps, at_least=0) for name in ("fgsm", "pgd")]
    assert assert_robust(*arguments, attack=tmp_path / "two.yaml", eps=eps, at_least=0) <= min(alone)


def test_repeats_itself_and_leaves_no_trace(problem):
    model = nn.Sequential(problem.model, nn.Dropout(0.5)).train()
    arguments = {"eps": float(problem.nearest("linf").median()), "at_least": 0.0, "chunk_size": 7}
    state = torch.get_rng_state()
    first = assert_robust(model, problem.images, problem.labels, **arguments)
    assert torch.equal(torch.get_rng_state(), state)
    assert first == assert_robust(model, problem.images, problem.labels, **arguments)
    assert model.training and all(p.requires_grad for p in model.parameters())


def test_minimal_norm_attacks_count_within_eps_only(problem):
    eps = float(problem.nearest("l2").median())
    found = assert_robust(*problem, attack="cw", eps=eps, at_least=0.0)
    assert 0.3 < found < 0.7


def test_takes_a_classifier_and_text(problem):
    classifier = Classifier(problem.model, ("a", "b", "c", "d"), input_size=8)
    assert assert_robust(classifier, problem.images, problem.labels, eps="0/255", at_least=1) == 1.0


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"images": torch.zeros(3, 8, 8)}, ValueError, "float32 images"),
        ({"images": torch.zeros(30, 3, 8, 8).numpy()}, ValueError, r"images as a torch.Tensor, got ndarray: torch.from_numpy"),
        ({"labels": [0] * 30}, ValueError, r"labels as a torch.Tensor, got list"),
        ({"images": torch.zeros(30, 3, 8, 8).double()}, ValueError, "float64"),
        ({"images": torch.full((30, 3, 8, 8), 2.0)}, ValueError, r"in \[0, 1\]"),
        ({"labels": torch.zeros(30)}, ValueError, "int64 labels"),
        ({"at_least": 40}, ValueError, "fraction"),
        ({"attack": "pdg"}, UnknownNameError, "pgd"),
        ({"eps": "8/0"}, ConfigError, "eps"),
        ({"model": nn.Identity()}, ModelError, r"expected logits \(N, classes\).*\(1, 3, 8, 8\)"),
        ({"model": nn.Sequential(nn.Flatten(), nn.Threshold(9, float("nan")))}, ModelError, "NaN"),
    ],
)
def test_what_does_not_fit_is_said(problem, change, error, message):
    arguments = {"model": problem.model, "images": problem.images, "labels": problem.labels, "eps": 0.01, "at_least": 0.5}
    arguments.update(change)
    model, images, labels = (arguments.pop(name) for name in ("model", "images", "labels"))
    with pytest.raises(error, match=message):
        assert_robust(model, images, labels, **arguments)


@pytest.mark.parametrize("shift", [1, -1])
def test_labels_of_no_class_are_refused(problem, shift):
    with pytest.raises(ValueError, match="expected labels of 0 to 3, got"):
        assert_robust(problem.model, problem.images, problem.labels + shift, eps=0.1, at_least=0)


def test_a_model_built_in_inference_mode_is_refused(problem):
    with torch.inference_mode():
        model = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    with pytest.raises(ValueError, match="was built inside torch.inference_mode"):
        assert_robust(model, problem.images, problem.labels, eps=0.1, at_least=0)


def test_inside_inference_mode_it_attacks_as_outside(problem):
    arguments = {"eps": float(problem.nearest("linf").median()), "at_least": 0}
    outside = assert_robust(*problem, **arguments)
    with torch.inference_mode():
        assert assert_robust(problem.model, problem.images.clone(), problem.labels.clone(), **arguments) == outside


def test_a_pass_that_means_little_warns(problem):
    rounding = nn.Sequential(Function(lambda images: (64 * images).round() / 64), problem.model)
    labels = rounding(problem.images).argmax(1)
    with pytest.warns(UserWarning, match="too high: the gradient of the model's logits was zero"):
        assert_robust(rounding, problem.images, labels, attack="fgsm", eps="1/255", at_least=0.9)
