import numpy as np
import pandas as pd
import pytest

from lrrobust.plots import differences, render_differences


def test_differences_stand_where_the_numbers_say(monkeypatch):
    figures = []
    render = differences.render
    monkeypatch.setattr(differences, "render", lambda figure, kinds: figures.append(figure) or render(figure, kinds))
    rows = pd.DataFrame(
        {"attack": "pgd", "norm": "linf", "eps": [2 / 255, 1 / 255], "difference": [0.1, -0.2], "low": [0.0, -0.5], "high": 0.3}
    )
    assert render_differences(rows, "a minus b", 0.02, ["svg"])["svg"].startswith(b"<?xml")
    (panel,) = figures[0].axes
    points = next(line for line in panel.get_lines() if line.get_marker() == "o")
    np.testing.assert_allclose(points.get_xydata(), [(1 / 255, -20), (2 / 255, 10)])
    (bars,) = panel.collections
    np.testing.assert_allclose([segment[:, 1] for segment in bars.get_segments()], [(-50, 30), (0, 30)])
    band = panel.patches[0].get_bbox()
    assert (band.y0, band.y1) == (-2, 2)
    with pytest.raises(ValueError, match="one norm"):
        render_differences(pd.concat([rows, rows.assign(norm="l2")]), "", 0.02, ["svg"])
