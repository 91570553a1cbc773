"""What attacks of the run left standing, and new ones break."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from lrrobust.attacks.specs import ApgdSpec, PgdSpec, SquareSpec
from lrrobust.diagnostics.stronger_attacks import MOST_SURVIVORS, check_convergence
from lrrobust.diagnostics.subject import Subject
from lrrobust.frozen import frozen

LADDER = tuple(step / 255 for step in (2, 4, 8, 16))
PGD = PgdSpec(name="pgd", kind="pgd", norm="linf", eps=LADDER, steps=10)
MARGIN = PGD.model_copy(update={"name": "margin", "loss": "margin"})
TARGETED = ApgdSpec(name="targeted", kind="apgd", norm="linf", eps=LADDER[1::2], loss="targeted_dlr", targets=9, steps=5)
SQUARE = SquareSpec(name="square", kind="square", norm="linf", eps=LADDER[1::2], queries=20)
PGD_L1 = PgdSpec(name="pgd_l1", kind="pgd", norm="l1", eps=(0.02, 0.05, 0.1, 0.2, 0.4), steps=20)


@pytest.fixture
def converged(subject_of):
    """Evaluates a model, and asks whether its attacks have converged."""

    def run(model, *specs, **options):
        subject = subject_of(model, *specs, **options)
        with frozen(model):
            (found,) = check_convergence(subject)
        return found

    return run


def test_decoys_that_follow_the_leading_class_do_not_pass_for_robustness(converged, confident_cnn, with_decoys):
    specs = (MARGIN.model_copy(update={"eps": LADDER[1::2]}), TARGETED, SQUARE)
    sound = converged(confident_cnn, *specs)
    assert sound.passed, sound.detail
    found = converged(with_decoys(confident_cnn, 16), *specs)
    assert found.passed is False and "are none that images are taken for, as decoys are" in found.detail
    # Losses of all logits are as blind.
    assert "with 40 steps breaks 0 of" in found.detail and "does not matter to, 0 more" in found.detail


class OneValue(nn.Module):
    """Linear, with large weights of a single value: along it the way out of a class is steepest."""

    def __init__(self):
        super().__init__()
        weight = 0.5 * torch.randn(5, 192, generator=torch.Generator().manual_seed(3))
        weight[:, 0] += torch.linspace(-20, 20, 5)
        self.layer = nn.Linear(192, 5)
        with torch.no_grad():
            self.layer.weight.copy_(weight)
            self.layer.bias.copy_(-0.5 * weight.sum(1))

    def forward(self, images):
        return self.layer(images.flatten(1))


def test_steps_in_l1_that_change_too_many_values(converged):
    # A hundredth of the values are two.
    found = converged(OneValue(), PGD_L1)
    assert found.passed is False and ": their steps change more values than they should" in found.detail
    found = converged(OneValue(), PGD_L1.model_copy(update={"sparsity": 0.005}))
    assert found.passed, found.detail


def test_an_attack_that_falls_short_at_its_largest_budget_alone(converged, sound_linear):
    near = PGD.model_copy(update={"eps": LADDER[:2]})
    weak = PGD.model_copy(update={"name": "weak", "eps": LADDER[3:], "steps": 2, "step_size_ratio": 0.2})
    found = converged(sound_linear, near, weak)
    assert found.passed is False and "At eps 16/255" in found.detail
    found = converged(sound_linear, PGD)
    assert found.passed and "; at eps 8/255, the largest that leaves enough to look at, they break 0 of" in found.detail


def fall_short(seed):
    """A fifth of the images count as left standing at every budget, as if the attacks had not broken them."""
    spoiled = np.random.default_rng(seed).random(120) < 0.2

    def spoil(outcomes):
        breaking = np.where(spoiled, np.inf, outcomes.breaking_eps)
        return dataclasses.replace(outcomes, breaking_eps=breaking, is_broken=breaking <= np.array(outcomes.eps)[:, None])

    return spoil


def test_a_tenth_that_stands_wrongly_is_noticed(subject_of, sound_linear, monkeypatch):
    # Of those that are broken by half a fifth is a tenth of all.
    subject = subject_of(sound_linear, PGD.model_copy(update={"eps": LADDER[1:2]}))
    struck, strike = [], Subject.strike

    def count(self, spec, eps, places, classes=None):
        struck.append(len(places) * (spec.name == "convergence"))
        return strike(self, spec, eps, places, classes)

    passed = []
    with frozen(sound_linear):
        assert [found.passed for found in check_convergence(subject)] == [True]
        monkeypatch.setattr(Subject, "strike", count)
        for seed in range(10):
            struck.clear()
            spoiled = dataclasses.replace(subject, outcomes=tuple(map(fall_short(seed), subject.outcomes)))
            passed += [found.passed for found in check_convergence(spoiled)]
            assert 0 < sum(struck) <= MOST_SURVIVORS
    assert passed.count(False) >= 8
