"""FMN's radii; what it shares with others is tested in test_minimal_norm.py."""

import math

import pytest
from made_models import Function
from torch import nn

from lrrobust.attacks.losses import margin
from lrrobust.attacks.specs import FmnSpec
from lrrobust.threat import distance


def test_the_ball_shrinks_beyond_the_boundary_and_grows_before_it(path_of):
    spec = FmnSpec(kind="fmn", name="fmn", norm="l2", eps=(0.1,), steps=12, first_change=0.2, last_change=0.05)
    changes = [0.05 + 0.15 * (1 + math.cos(math.pi * step / 11)) / 2 for step in range(12)]
    expected, radius = [0.0, 1.0], 1.0
    for change in changes[1:11]:
        radius *= 1 - change if radius >= 1 else 1 + change
        expected.append(radius)
    assert path_of(spec)[:12] == pytest.approx(expected, rel=1e-3)
    assert min(expected[2:]) < 0.9 and max(expected) > 1.02


def test_the_ball_holds_nothing_farther_than_the_nearest_found(path_of):
    # Short steps: the ball has grown far beyond the boundary by the time that it is crossed.
    sizes = {"first_step_size": 0.1, "last_step_size": 0.1, "first_change": 0.2, "last_change": 0.2}
    path = path_of(FmnSpec(kind="fmn", name="fmn", norm="l2", eps=(0.1,), steps=15, **sizes))
    crossed = next(step for step, length in enumerate(path) if length > 1)
    assert 3 < crossed < 12 and max(path) == pytest.approx(path[crossed])


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_a_ball_that_began_far_too_large_comes_down(norm, linear_problem, attack_with):
    # Probabilities of a confident model: the boundary linearised at the image lies 33 times too far away.
    problem = linear_problem(1, classes=2)
    lead = margin(problem.model(problem.images), problem.labels).abs().item()
    model = nn.Sequential(problem.model, Function(lambda logits: (6 / lead * logits).softmax(1)))
    attacked = attack_with(FmnSpec(kind="fmn", name="fmn", norm=norm, eps=(0.1,)), model, problem.images, problem.labels)
    assert distance(problem.images, attacked.proposals[0], norm) <= 1.1 * problem.nearest(norm)
