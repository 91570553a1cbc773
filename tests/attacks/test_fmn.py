"""FMN's radii; what it shares with others is tested in test_minimal_norm.py."""

import math

import pytest

from lrrobust.attacks.specs import FmnSpec


def test_the_ball_shrinks_beyond_the_boundary_and_grows_before_it(path_of):
    spec = FmnSpec(kind="fmn", name="fmn", norm="l2", eps=(0.1,), steps=12, first_change=0.2, last_change=0.05)
    changes = [0.05 + 0.15 * (1 + math.cos(math.pi * step / 11)) / 2 for step in range(12)]
    expected, radius = [0.0, 1.0], 1.0
    for change in changes[1:11]:
        radius *= 1 - change if radius >= 1 else 1 + change
        expected.append(radius)
    assert path_of(spec)[:12] == pytest.approx(expected, rel=1e-3)
    assert min(expected[2:]) < 0.9 and max(expected) > 1.02
