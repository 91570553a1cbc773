"""DeepFool's steps; what it shares with others is tested in test_minimal_norm.py."""

import pytest

from lrrobust.attacks.specs import DeepFoolSpec


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_one_step_crosses_a_plane_and_the_search_ends(norm, path_of):
    spec = DeepFoolSpec(kind="deepfool", name="deepfool", norm=norm, eps=(0.1,), overshoot=0.3)
    choice, first, crossed, judged = path_of(spec)
    assert (choice, first, crossed, judged) == pytest.approx((0, 0, 1.3, 1.3), rel=1e-4)
