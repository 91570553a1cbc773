import numpy as np
import pandas as pd
import pytest

from lrrobust.plots import distances, render_distances


def curve(model, attack, eps, robust_accuracy, is_minimal_norm):
    columns = {"model": model, "attack": attack, "eps": eps, "robust_accuracy": robust_accuracy}
    return pd.DataFrame(columns | {"is_minimal_norm": is_minimal_norm})


@pytest.fixture
def figure(monkeypatch):
    figures = []
    render = distances.render
    monkeypatch.setattr(distances, "render", lambda figure, kinds: figures.append(figure) or render(figure, kinds))

    def draw(*curves, norm="l2"):
        assert render_distances(pd.concat(curves), norm, "a and b", ["svg"])["svg"].startswith(b"<?xml")
        return figures[-1]

    return draw


def test_fixed_budgets_and_distances_share_one_axis(figure):
    drawn = figure(
        curve("a", "pgd_l2", [0.0, 0.5, 1.0], [0.8, 0.4, 0.2], False), curve("a", "cw", [0.0, 0.3, 0.7], [0.8, 0.5, 0.1], True),
        curve("b", "pgd_l2", [0.0, 0.5, 1.0], [0.9, 0.5, 0.3], False),
    )  # fmt: skip
    (panel,) = drawn.axes
    line, filled, step, hollow, of_other, _ = panel.get_lines()
    np.testing.assert_allclose(line.get_xydata()[:3], [(0, 80), (0.5, 40), (1, 20)])
    np.testing.assert_allclose(step.get_xydata(), [(0, 80), (0.3, 50), (0.7, 10), (1, 10)])
    assert (line.get_drawstyle(), step.get_drawstyle()) == ("default", "steps-post")
    # Signs of the step stand at the ladder of the others: at 0.5 the image found at 0.3 is gone, that at 0.7 is not.
    np.testing.assert_allclose(hollow.get_xydata(), [(0, 80), (0.5, 50), (1, 10)])
    # Without colour: the dash is the model's, the sign the attack's.
    assert line.get_linestyle() == step.get_linestyle() != of_other.get_linestyle()
    assert filled.get_marker() != hollow.get_marker() and hollow.get_markerfacecolor() == "none"
    assert [text.get_text() for text in drawn.legends[0].get_texts()] == ["a", "b", "pgd l2", "cw"]


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_without_any_ladder(figure, norm):
    (panel,) = figure(curve("a", "cw", [0.0], [0.5], True), norm=norm).axes
    np.testing.assert_allclose(panel.get_lines()[0].get_ydata(), 50)


def test_nothing_to_draw():
    with pytest.raises(ValueError, match="at least one curve"):
        render_distances(curve("a", "cw", [], [], True), "l2", "", ["svg"])
