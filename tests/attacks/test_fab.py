"""FAB's path to the boundary; what it shares with others is tested in test_minimal_norm.py."""

import pytest
import torch
from made_models import Function

from lrrobust.attacks.specs import FabSpec
from lrrobust.threat import distance


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_path_is_that_of_the_paper(norm, path_of):
    spec = FabSpec(
        kind="fab_t", name="fab_t", norm=norm, eps=(0.1,), steps=2, overshoot=1.05, largest_pull=0.1, backward_share=0.9
    )
    choice, first, beyond, back, again, *_ = path_of(spec)
    assert (choice, first, beyond, back) == pytest.approx((0, 0, 1.05, 0.9 * 1.05), rel=1e-4)
    # From there the boundary is 0.055 away, from the clean image 1: the weight of the way from the clean image is their share.
    ahead = 1 - back
    pull = ahead / (ahead + 1)
    assert again == pytest.approx((1 - pull) * (back + 1.05 * ahead) + pull * 1.05, rel=1e-4)
    assert again > back + 1.05 * ahead + 1e-3


def test_the_pull_is_bounded(path_of):
    spec = FabSpec(kind="fab_t", name="fab_t", norm="l2", eps=(0.1,), steps=2, largest_pull=0.02)
    *_, back, again = path_of(spec)[:5]
    assert again == pytest.approx(0.98 * (back + 1.05 * (1 - back)) + 0.02 * 1.05, rel=1e-4)


def two_ways(images):
    """Class 1 is likelier than class 2 beside the label 0, but its boundary is farther away: 0.4, not 0.1."""
    change = images.flatten(1) - 0.5
    return torch.stack([0 * change[:, 0], change[:, 0] - 0.4, 10 * change[:, 1] - 1], 1)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_likeliest_class_need_not_be_the_nearest(norm, attack_with):
    images, labels = torch.full((2, 3, 2, 2), 0.5), torch.zeros(2, dtype=torch.int64)
    for targets, nearest in ((1, 0.4), (2, 0.1)):
        spec = FabSpec(kind="fab_t", name="fab_t", norm=norm, eps=(0.1,), targets=targets, steps=5)
        found = distance(images, attack_with(spec, Function(two_ways), images, labels).proposals[0], norm)
        assert found.tolist() == pytest.approx([nearest] * 2, rel=0.01)
