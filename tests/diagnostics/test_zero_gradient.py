"""An attack without a gradient of what it climbs, where other losses have one."""

import pytest
import torch
from torch import nn

from lrrobust.attacks.specs import ApgdSpec, CwSpec, DeepFoolSpec, FmnSpec, HopSkipJumpSpec, PgdSpec, SquareSpec
from lrrobust.diagnostics.stronger_attacks import check_convergence
from lrrobust.diagnostics.zero_gradient import check_zero_gradient, climbed
from lrrobust.frozen import frozen

LADDER = (8 / 255,)
PGD = PgdSpec(name="pgd", kind="pgd", norm="linf", eps=LADDER, steps=3)
MARGIN = PGD.model_copy(update={"name": "margin", "loss": "margin"})
DLR = ApgdSpec(name="dlr", kind="apgd", norm="linf", eps=LADDER, loss="dlr", steps=3)
TARGETED = DLR.model_copy(update={"name": "targeted", "loss": "targeted_dlr", "targets": 8})
FMN = FmnSpec(name="fmn", kind="fmn", norm="linf", eps=LADDER, steps=3)


def results(subject):
    with frozen(subject.judge.model):
        return {result.attack: result.passed for result in check_zero_gradient(subject)}


def test_each_attack_is_asked_for_the_gradient_of_what_it_climbs(subject_of, sound_cnn, with_decoys):
    specs = (PGD, MARGIN, DLR, TARGETED, FMN)
    assert set(results(subject_of(sound_cnn, *specs)).values()) == {True}
    of_decoys = results(subject_of(with_decoys(sound_cnn, 8), *specs))
    assert of_decoys == {"pgd": True, "margin": False, "dlr": False, "targeted": False, "fmn": False}


def test_one_class_whose_lead_has_a_gradient_is_enough_for_an_attack_on_several(subject_of, sound_cnn, with_decoys):
    found = results(subject_of(with_decoys(sound_cnn, 1), MARGIN, TARGETED))
    assert found == {"margin": False, "targeted": True}


@pytest.mark.parametrize(
    ("spec", "loss"),
    [
        (CwSpec(name="cw", kind="cw", eps=(0.1,), binary_search_steps=1, steps=1, lr=0.1, initial_c=1.0), ("margin", 1)),
        (DeepFoolSpec(name="deepfool", kind="deepfool", norm="l2", eps=(0.1,)), ("leads", 9)),
        (MARGIN.model_copy(update={"target": "top_k", "targets": 3}), ("leads", 3)),
        (DLR, ("margin", 1)),
        (MARGIN.model_copy(update={"target": "random"}), ("log_odds", 1)),
        (PGD.model_copy(update={"target": "top_k"}), ("log_odds", 1)),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_what_attacks_climb(spec, loss):
    assert climbed(spec) == loss


class Answering(nn.Module):
    """A network whose answers say less than its logits do, and carry no gradient."""

    def __init__(self, network, answer):
        super().__init__()
        self.network, self.answer = network, answer

    @torch.no_grad()
    def forward(self, images):
        return self.answer(self.network(images))


SQUARE = SquareSpec(name="square", kind="square", norm="linf", eps=LADDER, queries=20)
HOP_SKIP_JUMP = HopSkipJumpSpec(name="hsj", kind="hop_skip_jump", norm="linf", eps=LADDER, queries=40)


@pytest.mark.parametrize(
    ("answer", "passed"),
    [
        (lambda logits: logits, True),
        (lambda logits: (100 * logits).round() / 100, True),
        (lambda logits: nn.functional.one_hot(logits.argmax(1), logits.shape[1]).float(), False),
    ],
    ids=["logits", "rounded", "class"],
)
def test_black_box_attacks_need_answers_that_change(subject_of, sound_cnn, answer, passed):
    subject = subject_of(Answering(sound_cnn, answer).eval(), SQUARE)
    assert results(subject) == {"square": passed}
    # Which asks for no more than the class.
    assert results(subject_of(subject.judge.model, HOP_SKIP_JUMP)) == {}
    with frozen(subject.judge.model):
        assert not subject.has_gradient()
        (convergence,) = check_convergence(subject)
    assert convergence.passed is None and "carry no gradient" in convergence.detail
