import math

import pytest

from lrrobust import formatting


@pytest.mark.parametrize(
    "shown, text",
    [
        (formatting.format_distance(math.nan, "linf"), "-"),
        (formatting.format_distance(math.inf, "l2"), "inf"),
        (formatting.format_distance(0.5 / 255, "linf"), "0.5/255"),
        (formatting.format_distance(0.5, "l2"), "0.5"),
        (formatting.format_eps(0.0, "linf"), "0"),
        (formatting.format_percent(0.12345), "12.3"),
        (formatting.format_interval(0.1, 0.2), "10.0-20.0"),
        (formatting.format_duration(99.4), "99.4 s"),
        (formatting.format_duration(150), "2.5 min"),
        (formatting.format_duration(9000), "2.5 h"),
        (formatting.format_passes(20, math.nan), "20+?"),
        (formatting.format_passes(math.nan, math.nan), "-"),
        (formatting.format_count(0, "image"), "0 images"),
    ],
)
def test_numbers_are_as_people_write_them(shown, text):
    assert shown == text
