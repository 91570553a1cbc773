import pytest
from scipy.stats import binomtest

from lrrobust.report.curves import minimal_norm_curves


def test_minimal_norm_curve_is_exact(make_run):
    curve = minimal_norm_curves([make_run()])
    assert list(curve["eps"]) == [0, 0.2, 0.3, 0.4]
    assert list(curve["robust_accuracy"]) == [4 / 5, 3 / 5, 2 / 5, 1 / 5]
    interval = binomtest(3, 5).proportion_ci(0.95, method="wilson")
    assert tuple(curve.loc[1, ["ci_low", "ci_high"]]) == pytest.approx((interval.low, interval.high))
    assert set(curve["attack"]) == {"cw"}
