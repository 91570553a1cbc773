import re
import sys
from pathlib import Path

import pytest
import torch
from made_models import Function
from torch import nn

from lrrobust.errors import ModelError
from lrrobust.evaluation.judge import Judge, call_model, check_evaluation_mode, gap, logit_scale
from lrrobust.frozen import frozen
from lrrobust.threat import ThreatModel

KEYS = ("a", "b", "c", "d")


def threshold(images):
    """Class 1 where the mean of the image is above one half."""
    score = 10 * (images.flatten(1).mean(1) - 0.5)
    return torch.stack([-score, score], 1)


@pytest.fixture
def judge():
    return Judge(Function(threshold).eval(), 2)


@pytest.fixture
def clean():
    return torch.full((4, 3, 4, 4), 0.48), torch.zeros(4, dtype=torch.int64)


def test_margin_is_true_logit_minus_largest_other(judge, clean):
    images, labels = clean
    labels = torch.tensor([0, 1, 0, 1])
    prediction = judge.predict(images, labels, KEYS)
    assert prediction.label.tolist() == [0, 0, 0, 0]
    torch.testing.assert_close(prediction.margin, torch.tensor([0.4, -0.4, 0.4, -0.4]).double(), atol=1e-5, rtol=0)


def test_only_what_is_wrong_and_allowed_is_adversarial(judge, clean):
    images, labels = clean
    proposed = images.clone()
    proposed[0] += 0.03  # crosses, inside the ball
    proposed[1] += 0.05  # crosses, outside the ball
    proposed[2] += 0.01  # does not cross
    judgement = judge.judge(images, labels, proposed, ThreatModel("linf", 0.04), KEYS)
    assert judgement.is_adversarial.tolist() == [True, False, False, False]
    assert judgement.is_rejected.tolist() == [False, True, False, False]
    torch.testing.assert_close(judgement.distances["linf"][:3], torch.tensor([0.03, 0.05, 0.01]).double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(judgement.distances["l2"][1], torch.tensor(0.05 * 48**0.5).double(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("bad_value", [1.01, -0.01, float("nan"), float("inf")])
def test_pixels_outside_the_box_never_count(judge, bad_value):
    images, labels = torch.full((1, 3, 4, 4), 0.499), torch.zeros(1, dtype=torch.int64)
    proposed = images + 0.01
    proposed[0, 0, 0, 0] = bad_value
    judgement = judge.judge(images, labels, proposed, ThreatModel("linf", 1.0), KEYS[:1])
    assert not judgement.is_adversarial.any()


def test_overshoot_below_the_tolerance_is_allowed_and_above_is_not(judge):
    images, labels = torch.full((2, 3, 4, 4), 0.4999), torch.zeros(2, dtype=torch.int64)
    proposed = images + torch.tensor([0.01 + 5e-7, 0.01 + 5e-6]).view(2, 1, 1, 1)
    judgement = judge.judge(images, labels, proposed, ThreatModel("linf", 0.01), KEYS[:2])
    assert judgement.is_adversarial.tolist() == [True, False]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda x: torch.full((len(x), 2), float("nan")), "NaN or infinite logits for 4 of 4 images, the first is a"),
        (lambda x: torch.full((len(x), 2), float("inf")), "NaN or infinite logits"),
        (lambda x: torch.tensor([[0, 0], [0, 0], [0, torch.nan], [0, 0]]), "for 1 of 4 images, the first is c"),
        (
            lambda x: torch.zeros(len(x), 3),
            r"tensor \(4, 3\).*expected logits of shape \(4, 2\), one for each .* model$",
        ),
        (lambda x: torch.zeros(len(x)), r"expected logits of shape \(4, 2\)"),
        (
            lambda x: torch.zeros(len(x), 1),
            r"tensor \(4, 1\).*if its sigmoid is the probability.*return torch.stack\(\[0 \* z, z\], 1\)",
        ),
        (lambda x: torch.zeros(len(x), 2, dtype=torch.int64), "int64"),
        (lambda x: (torch.zeros(len(x), 2),), "returns tuple"),
    ],
)
def test_logits_that_cannot_be_trusted_are_refused(clean, answer, message):
    with pytest.raises(ModelError, match=message):
        Judge(Function(answer).eval(), 2).predict(*clean, KEYS)


def test_a_model_for_grey_images_is_told_how_to_take_them(clean):
    grey = nn.Sequential(nn.Flatten(), nn.Linear(clean[0][0, 0].numel(), 2)).eval()
    with pytest.raises(ModelError, match=r"call it on images\[:, :1\] inside forward"):
        Judge(grey, 2).predict(*clean, KEYS)
    with pytest.raises(ModelError, match=r"mat1 and mat2 .*\)$"):
        Judge(nn.Sequential(nn.Flatten(), nn.Linear(7, 2)).eval(), 2).predict(*clean, KEYS)


def test_a_model_that_ends_the_program_fails_like_any_other(clean):
    """With its exit code it would speak for the evaluation: after a 0 a gate in somebody's CI passes."""
    with pytest.raises(ModelError, match=r"the model fails on images of shape .* with SystemExit: 0"):
        Judge(Function(lambda _: sys.exit(0)).eval(), 2).predict(*clean, KEYS)


def test_a_part_in_training_mode_is_named():
    model = nn.Sequential(nn.Identity(), nn.Dropout()).eval()
    check_evaluation_mode(model)
    model[1].train()
    with pytest.raises(ModelError, match="'1' is in training mode"):
        check_evaluation_mode(model)


def test_a_model_that_trains_in_forward_is_refused(clean):
    model = Function(lambda images: model.train() and threshold(images)).eval()
    with pytest.raises(ModelError, match="is in training mode"):
        Judge(model, 2).predict(*clean, KEYS)


def test_the_image_whose_logits_differ_most_decides():
    logits = torch.tensor([[-9.0, -1.0, -2.0, -30.0], [0.0, 0.25, 0.5, 0.125]])
    assert logit_scale(logits) == 9 and logit_scale(logits[1:]) == 0.5 and logit_scale(logits[1:] + 100) == 0.5
    others = logits + torch.tensor([[0.0, 0.0, 0.0, 7.0], [0.0, 0.0, -0.5, 0.0]])
    assert gap(logits, others) == gap(others, logits) == 0.5


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_frozen_script_modules_have_no_mode_and_are_in_evaluation():
    script = torch.jit.freeze(torch.jit.script(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)).eval()))
    model = nn.Sequential(script)
    for each in (script, model):
        with frozen(each):
            check_evaluation_mode(each)
    assert model.training


def test_parameters_of_another_dtype_are_named():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2)).double()
    with pytest.raises(ModelError, match=r"its parameters are torch.float64, the images torch.float32: call .float\(\) on it"):
        call_model(model, torch.zeros(2, 3, 2, 2))
    with pytest.raises(ModelError, match="shapes cannot be multiplied[^:]*$"):
        call_model(model.float(), torch.zeros(2, 3, 3, 2))


def test_frozen_restores_modes_and_gradients_even_after_an_error():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    model[1].eval()
    model[0].bias.requires_grad_(False)
    with pytest.raises(RuntimeError, match="inside"), frozen(model):
        assert not any(module.training for module in model.modules())
        assert not any(parameter.requires_grad for parameter in model.parameters())
        raise RuntimeError("inside")
    assert (model.training, model[0].training, model[1].training) == (True, True, False)
    assert [p.requires_grad for p in model.parameters()] == [True, False, True, True]


def test_every_image_may_have_a_budget_of_its_own(judge, clean):
    images, labels = clean
    threat = ThreatModel("linf", torch.tensor([0.03, 0.031, 0.05, 0.029], dtype=torch.float64))
    assert judge.judge(images, labels, images + 0.03, threat, KEYS).is_adversarial.tolist() == [True, True, True, False]


def test_no_batch_is_larger_than_allowed(clean):
    sizes = []
    model = Function(threshold).eval()
    model.register_forward_hook(lambda module, inputs, output: sizes.append(len(inputs[0])))
    whole, parts = Judge(model, 2), Judge(model, 2, batch_size=3)
    assert torch.equal(whole.predict(*clean, KEYS).margin, parts.predict(*clean, KEYS).margin)
    assert sizes == [4, 3, 1]


class OneMemory(nn.Module):
    """Answers into the same memory every time, as wrappers of other runtimes do."""

    def __init__(self, model):
        super().__init__()
        self.model, self.memory = model, {}

    def forward(self, images):
        logits = self.model(images)
        return self.memory.setdefault(len(images), torch.empty_like(logits)).copy_(logits)


def test_answers_into_one_memory_are_kept_apart(linear_problem):
    problem = linear_problem(9, 3)
    keys = [str(place) for place in range(9)]
    plain = Judge(problem.model, 3, batch_size=3).predict(problem.images, problem.labels, keys)
    found = Judge(OneMemory(problem.model).eval(), 3, batch_size=3).predict(problem.images, problem.labels, keys)
    assert torch.equal(found.label, plain.label) and torch.equal(found.margin, plain.margin)


def test_distances_are_from_the_images_as_they_came(linear_problem):
    problem = linear_problem(6, 3)
    limit = problem.images.flatten(1).mean(1).median()

    def darken_the_bright(images):
        images[images.flatten(1).mean(1) > limit] *= 0.5
        return problem.model(images)

    judge, keys = Judge(Function(darken_the_bright).eval(), 3), [str(place) for place in range(6)]
    images, proposed = problem.images.clone(), problem.images + 0.25
    found = judge.judge(images, problem.labels, proposed, ThreatModel("linf", 0.25), keys)
    assert torch.equal(images, problem.images) and torch.equal(proposed, problem.images + 0.25)
    assert found.distances["linf"].tolist() == pytest.approx([0.25] * 6, abs=1e-6)


def test_readme_judges_images_of_an_attack_of_ones_own(clean):
    text = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    (block,) = [block for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL) if "Judge(" in block]
    images, labels = clean
    steps = torch.tensor([0, 7, 8, 9]).view(4, 1, 1, 1) / 255
    named = {"model": Function(threshold), "num_classes": 2, "images": images, "labels": labels, "proposed": images + steps}
    exec(block, named)
    # A step of 6/255 turns the class, and 9/255 is outside of the ball.
    assert named["judged"].is_adversarial.tolist() == [False, True, True, False]
    assert named["judged"].is_rejected.tolist() == [False, False, False, True]
