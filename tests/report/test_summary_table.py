import math

import pytest

from lrrobust.report.summary import summarise
from lrrobust.report.summary_table import HOW_TO_READ_ANY, HOW_TO_READ_CUMULATIVE, format_row, how_to_read

INF = math.inf


@pytest.mark.parametrize(
    "changes, heading, text",
    [
        ({}, "eps", "0.5/255"),
        ({"eps": 4 / 255}, "eps", "4/255"),
        ({"eps": 0.05, "norm": "l2"}, "eps", "0.05"),
        ({"eps": INF}, "eps", "any"),
        ({"eps": 0.0}, "eps", "0"),
        ({}, "robust %", "34.5"),
        ({}, "95 % CI", "30.0-40.1"),
        ({}, "n", "100"),
        ({"is_complete": False}, "n", "100*"),
        ({}, "median distance", "0.5/255"),
        ({"median_distance": INF}, "median distance", "inf"),
        ({"median_distance": math.nan}, "median distance", "-"),
        ({"median_distance": 0.1234, "norm": "l2"}, "median distance", "0.123"),
        ({}, "time", "12.3 s"),
        ({"wall_s": 600.0}, "time", "10.0 min"),
        ({"wall_s": 9000.0}, "time", "2.5 h"),
        ({"weights": None}, "weights", "-"),
        ({}, "passes", "61.2+60"),
        ({"backward_passes": math.nan}, "passes", "61.2+?"),
        ({"forward_passes": math.nan, "backward_passes": math.nan}, "passes", "-"),
        ({}, "images made on", "-"),
        ({"surrogate": "other"}, "images made on", "other"),
        ({}, "attack", "pgd"),
        ({"is_cumulative": True}, "attack", "pgd†"),
        ({}, "balanced %", "-"),
        ({"effective_n": 60.0}, "balanced %", "25.0"),
        ({"effective_n": 60.0}, "balanced clean %", "70.0"),
        ({"effective_n": 60.0}, "balanced 95 % CI", "15.0-45.0"),
        ({}, "8-bit robust %", "-"),
        ({"robust_accuracy_quantized": 0.4}, "8-bit robust %", "40.0"),
    ],
)
def test_format_row(changes, heading, text):
    record = {
        "forward_passes": 61.234,
        "backward_passes": 60.0,
        "model": "tiny",
        "weights": "V1",
        "surrogate": None,
        "robust_accuracy_quantized": math.nan,
        "balanced_clean_accuracy": 0.7,
        "balanced_robust_accuracy": 0.25,
        "balanced_ci_low": 0.15,
        "balanced_ci_high": 0.45,
        "effective_n": 90.0,
        "is_cumulative": False,
        "dataset": "sample",
        "attack": "pgd",
        "norm": "linf",
        "eps": 0.5 / 255,
        "n": 100,
        "clean_accuracy": 0.8,
        "robust_accuracy": 0.345,
        "ci_low": 0.3,
        "ci_high": 0.401,
        "median_distance": 0.5 / 255,
        "wall_s": 12.3,
        "is_complete": True,
        "run": "run",
    }
    assert format_row(record | changes)[heading] == text


def test_how_to_read_says_what_the_marks_mean(make_run):
    summary = summarise([make_run()])
    assert how_to_read(summary[summary["eps"] < 1])[1:] == []
    assert how_to_read(summary)[1:] == [HOW_TO_READ_ANY]
    summary["is_cumulative"] = summary["attack"] == "pgd"
    assert how_to_read(summary)[1:] == [HOW_TO_READ_ANY, HOW_TO_READ_CUMULATIVE]
