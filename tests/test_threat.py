import math

import pytest
import torch

from lrrobust.threat import ThreatModel, box_diameter, distance, is_in_box


def test_distances_equal_their_definition():
    images = torch.zeros(2, 1, 1, 3)
    other = torch.tensor([[0.3, -0.4, 0.0], [0.1, 0.1, 0.1]]).view(2, 1, 1, 3)
    torch.testing.assert_close(distance(images, other, "linf"), torch.tensor([0.4, 0.1]).double(), atol=1e-7, rtol=0)
    torch.testing.assert_close(distance(images, other, "l2"), torch.tensor([0.5, 0.03**0.5]).double(), atol=1e-7, rtol=0)
    torch.testing.assert_close(distance(images, other, "l1"), torch.tensor([0.7, 0.3]).double(), atol=1e-7, rtol=0)
    assert distance(images, other, "l2").dtype == torch.float64
    for norm in ("linf", "l2", "l1"):
        assert distance(images, images + 1, norm).tolist() == [box_diameter(norm, 3)] * 2


@pytest.mark.parametrize("eps", [0.1, 20.0])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_ball_has_a_boundary_with_the_stated_slack(norm, eps):
    images = torch.zeros(3, 1, 1, 1, dtype=torch.float64)
    other = torch.tensor([eps, eps + 9.5e-7, eps + 1.05e-6], dtype=torch.float64).view(3, 1, 1, 1)
    assert ThreatModel(norm, eps).is_in_ball(images, other).tolist() == [True, True, False]


def test_the_slack_of_l1_grows_with_its_budget():
    images = torch.zeros(2, 1, 1, 1000, dtype=torch.float64)
    other = torch.full_like(images, 0.012)
    other[1] *= 1 + 1.15e-6
    assert ThreatModel("l1", 12.0).is_in_ball(images, other).tolist() == [True, False]
    other[0, ..., 0] += 1e-5
    assert ThreatModel("l1", 12.0).is_in_ball(images, other).tolist() == [True, False]


def test_nan_is_neither_in_ball_nor_in_box():
    images = torch.zeros(1, 1, 1, 2)
    other = torch.tensor([0.0, math.nan]).view(1, 1, 1, 2)
    assert not ThreatModel("linf", math.inf).is_in_ball(images, other).any()
    assert not ThreatModel("l2", math.inf).is_in_ball(images, other).any()
    assert not ThreatModel("l1", math.inf).is_in_ball(images, other).any()
    assert not is_in_box(other).any()


@pytest.mark.parametrize(
    ("pixel", "is_inside"), [(-9.5e-7, True), (1 + 9.5e-7, True), (-1.05e-6, False), (1 + 1.05e-6, False), (math.inf, False)]
)
def test_box(pixel, is_inside):
    assert is_in_box(torch.tensor([0.5, pixel]).view(1, 1, 1, 2)).tolist() == [is_inside]


@pytest.mark.parametrize(("norm", "eps"), [("l0", 1.0), ("linf", -1.0), ("l2", math.nan), ("l2", torch.tensor([1.0, -1.0]))])
def test_impossible_threats_are_refused(norm, eps):
    with pytest.raises(ValueError, match="must be"):
        ThreatModel(norm, eps)
