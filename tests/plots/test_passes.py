import numpy as np
import pandas as pd
import pytest

from lrrobust.plots import passes, render_passes


def curve(panel, attack, spent, robust_accuracy):
    return pd.DataFrame({"panel": panel, "attack": attack, "passes": spent, "robust_accuracy": robust_accuracy})


def test_a_panel_a_run_and_a_line_an_attack_which_ends_where_it_stopped(monkeypatch):
    figures = []
    render = passes.render
    monkeypatch.setattr(passes, "render", lambda figure, kinds: figures.append(figure) or render(figure, kinds))
    many = np.arange(1000.0)
    curves = [
        curve("one", "fgsm", [0.0, 2.0], [0.8, 0.5]), curve("one", "pgd", [0.0, 10.0, 80.0], [0.8, 0.4, 0.2]),
        curve("two", "pgd", many, 1 - many / 2000),
    ]  # fmt: skip
    assert render_passes(pd.concat(curves), "sample", "passes", 2, ["svg"])["svg"].startswith(b"<?xml")
    one, two = figures[0].axes
    fgsm, pgd = one.get_lines()
    np.testing.assert_allclose(fgsm.get_xydata(), [(0, 80), (2, 50)])
    np.testing.assert_allclose(pgd.get_xydata(), [(0, 80), (10, 40), (80, 20)])
    assert pgd.get_drawstyle() == "steps-post" and pgd.get_markevery() == [2]
    assert fgsm.get_linestyle() != pgd.get_linestyle() and fgsm.get_marker() != pgd.get_marker()
    # The same attack looks the same everywhere; long curves are thinned, but neither at their start nor their end.
    (thinned,) = two.get_lines()
    assert (thinned.get_marker(), thinned.get_linestyle()) == (pgd.get_marker(), pgd.get_linestyle())
    assert len(thinned.get_xdata()) == 400 and list(thinned.get_xdata()[[0, -1]]) == [0, 999]
    assert one.get_xlim() == two.get_xlim() and one.get_xlim()[1] > 999


def test_nothing_to_draw():
    with pytest.raises(ValueError, match="at least one curve"):
        render_passes(curve("one", "pgd", [], []), "", "", 2, ["svg"])
