import pytest

from lrrobust.diagnostics.decision import is_never_beaten, is_tolerable


@pytest.mark.parametrize(("n", "most"), [(10, 2), (24, 3), (64, 4)])
def test_counts_fail_where_chance_ends(n, most):
    # 2 % of n by the binomial distribution, at most 1 % of the time more.
    assert is_tolerable(most, n) is True
    assert is_tolerable(most + 1, n) is False


def test_too_few_images_say_nothing():
    assert is_tolerable(0, 0) is None
    assert is_tolerable(1, 1) is None
    assert is_tolerable(2, 2) is False


def test_a_weaker_attack_needs_more_than_chance():
    assert is_never_beaten([6], [0])  # p = 1/64
    assert not is_never_beaten([7], [0])  # p = 1/128
    # Two budgets are two tests.
    assert is_never_beaten([7, 0], [0, 5])
    assert is_never_beaten([20], [15])
