import io
import math

import matplotlib
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from lrrobust.plots import render_robustness_curves, robustness
from lrrobust.stats import wilson_interval

LADDER = [k / 255 for k in (1 / 8, 1 / 4, 1 / 2, 1, 2, 4)]


def curve(run, attack="pgd", norm="linf", ladder=LADDER, accuracies=(70, 60, 40, 20, 10, 0), **changes):
    """Rows of a summary: one run and attack on 100 images."""
    intervals = [wilson_interval(accuracy, 100) for accuracy in accuracies]
    record = {
        "model": "tiny",
        "weights": "V1",
        "dataset": "sample",
        "attack": attack,
        "norm": norm,
        "eps": ladder,
        "n": 100,
        "clean_accuracy": 0.8,
        "robust_accuracy": np.divide(accuracies, 100),
        "ci_low": [low for low, _ in intervals],
        "ci_high": [high for _, high in intervals],
        "median_distance": math.inf,
        "wall_s": 1.0,
        "is_complete": True,
        "run": run,
        "dataset_sha256": "cd" * 32,
    }
    return pd.DataFrame(record | changes)


@pytest.fixture
def drawn(monkeypatch):
    """The figures drawn during a test."""
    figures = []
    draw = robustness._draw
    monkeypatch.setattr(robustness, "_draw", lambda *arguments: figures.append(draw(*arguments)) or figures[-1])
    return figures


def lines(panel):
    return [line for line in panel.get_lines() if len(line.get_xdata())]


def test_files_are_pictures():
    summary = pd.concat([curve("a", model="one"), curve("b", model="two")])
    files = render_robustness_curves(summary, "linf", ["png", "svg", "pdf"])
    with Image.open(io.BytesIO(files["png"])) as image:
        assert image.width > 500 and image.height > 300 and len(image.convert("RGB").getcolors(1 << 20)) > 20
        assert image.convert("RGBA").getpixel((0, 0)) == (255, 255, 255, 255)
    assert files["svg"].startswith(b"<?xml")
    assert files["pdf"].startswith(b"%PDF-")


def test_line_begins_at_clean_accuracy_and_follows_the_summary(drawn):
    render_robustness_curves(curve("a"), "linf", ["svg"])
    (panel,) = drawn[0].axes
    (line,) = lines(panel)
    np.testing.assert_allclose(line.get_xdata(), [0, *LADDER])
    np.testing.assert_allclose(line.get_ydata(), [80, 70, 60, 40, 20, 10, 0])
    assert [label.get_text() for label in panel.get_xticklabels()] == ["0", "1/8", "1/4", "1/2", "1", "2", "4"]
    assert drawn[0].get_suptitle() == r"sample, $\ell_\infty$, n = 100"
    (band,) = panel.collections
    low, high = np.multiply(wilson_interval(80, 100), 100)
    at_zero = [y for x, y in band.get_paths()[0].vertices if x == 0]
    assert (min(at_zero), max(at_zero)) == pytest.approx((low, high))


def test_the_axis_shows_every_eps_in_order_and_apart(drawn):
    render_robustness_curves(curve("a"), "linf", ["svg"])
    (panel,) = drawn[0].axes
    places = panel.transData.transform([(eps, 0) for eps in [0, *LADDER]])[:, 0]
    np.testing.assert_allclose(np.diff(places), np.diff(places)[0], rtol=1e-6)  # octaves, 0 one octave away


def test_one_panel_an_attack_one_style_a_run(drawn):
    summary = pd.concat(
        [curve(run, attack, model=f"model {run}") for run in "abc" for attack in ("fgsm", "pgd", "apgd", "worst_case")]
    )
    render_robustness_curves(summary, "linf", ["svg"])
    figure = drawn[0]
    assert [panel.get_title() for panel in figure.axes] == ["fgsm", "pgd", "apgd", "worst case"]
    for panel in figure.axes:
        styles = [(line.get_color(), line.get_marker(), line.get_linestyle()) for line in lines(panel)]
        assert [len(set(of_kind)) for of_kind in zip(*styles)] == [3, 3, 3]
    assert [text.get_text() for text in figure.legends[0].texts] == ["model a", "model b", "model c"]


@pytest.mark.parametrize(
    "changes, labels",
    [
        ([{"weights": "V1"}, {"weights": "V2"}], ["tiny (V1)", "tiny (V2)"]),
        ([{"weights": None}, {"weights": "V2"}], ["tiny (own weights)", "tiny (V2)"]),
        ([{"weights": "", "run": "tiny-n9-0a"}, {"weights": "", "run": "tiny-n8-0b"}], ["tiny (0a)", "tiny (0b)"]),
        ([{}, {}], ["tiny (V1, a)", "tiny (V1, b)"]),
        ([{"model": "x"}, {"is_complete": False}], ["x", "tiny, incomplete"]),
    ],
)
def test_labels_say_as_little_as_tells_runs_apart(drawn, changes, labels):
    summary = pd.concat([curve(**({"run": run} | change)) for run, change in zip("ab", changes)])
    render_robustness_curves(summary, "linf", ["svg"])
    assert [text.get_text() for text in drawn[0].legends[0].texts] == labels


def test_minimal_norm_attacks_are_exact_steps(drawn):
    unbounded = curve("a", "cw", "l2", [math.inf], [0])
    steps = curve("a", "cw", "l2", [0.0, 0.2, 0.3, 0.7], [80, 60, 40, 0])
    ladder = curve("a", "pgd", "l2", [0.1, 0.25, 0.5], [70, 50, 30])
    render_robustness_curves(pd.concat([ladder, unbounded]), "l2", ["svg"], steps)
    _, panel = drawn[0].axes
    line, markers = lines(panel)
    assert line.get_drawstyle() == "steps-post"
    np.testing.assert_allclose(line.get_xdata(), [0, 0.2, 0.3, 0.5])
    np.testing.assert_allclose(line.get_ydata(), [80, 60, 40, 40])
    np.testing.assert_allclose(markers.get_xdata(), [0, 0.1, 0.25, 0.5])
    np.testing.assert_allclose(markers.get_ydata(), [80, 80, 60, 40])
    assert panel.get_xlim() == (0, 0.5)
    assert len(drawn[0].legends[0].texts) == 1


def test_a_curve_of_many_steps_is_thinned_but_not_at_its_marks(drawn):
    distances = np.linspace(0, 1, 10_001)
    ladder = curve("a", "pgd", "l2", [0.1, 0.3333], [70, 50])
    steps = curve("a", "cw", "l2", distances, [50] * 10_001, robust_accuracy=1 - distances)
    render_robustness_curves(pd.concat([ladder, curve("a", "cw", "l2", [math.inf], [0])]), "l2", ["svg"], steps)
    line, markers = lines(drawn[0].axes[1])
    assert len(line.get_xdata()) <= 400 and line.get_xdata()[0] == 0 and line.get_xdata()[-1] == 0.3333
    np.testing.assert_allclose(np.asarray(line.get_ydata()), 100 - 100 * np.asarray(line.get_xdata()), atol=0.011)
    np.testing.assert_allclose(markers.get_ydata(), [100, 90, 66.67], atol=0.011)


@pytest.mark.parametrize("steps", [[(0.0, 80), (0.2, 60), (0.9, 0)], [(0.0, 80)]])
def test_minimal_norm_attack_without_any_ladder(drawn, steps):
    unbounded = curve("a", "cw", "l2", [math.inf], [0])
    curves = curve("a", "cw", "l2", *([list(column) for column in zip(*steps)]))
    of_another_run = curve("b", "cw", "l2", [0.0, 5.0], [80, 0])
    render_robustness_curves(unbounded, "l2", ["svg"], pd.concat([curves, of_another_run]))
    (panel,) = drawn[0].axes
    assert panel.get_xscale() == "linear"
    assert panel.get_xlim() == (0, steps[-1][0] or 1)


def test_nothing_to_draw():
    assert render_robustness_curves(curve("a", norm="l2"), "linf", ["svg"]) == {}
    assert render_robustness_curves(curve("a", "cw", "l2", [math.inf], [0]), "l2", ["svg"]) == {}


def test_the_unbounded_eps_is_left_out_of_a_ladder(drawn):
    summary = curve("a", ladder=[0.0, 1 / 255, math.inf], accuracies=[80, 50, 0])
    render_robustness_curves(summary, "linf", ["svg"])
    np.testing.assert_allclose(lines(drawn[0].axes[0])[0].get_xdata(), [0, 1 / 255])


def test_many_eps_do_not_crowd_the_axis(drawn):
    ladder = list(np.linspace(0.1, 4, 40))
    render_robustness_curves(curve("a", "pgd", "l2", ladder, [50] * 40), "l2", ["svg"])
    assert len(drawn[0].axes[0].get_xticks()) <= 9
    assert len(lines(drawn[0].axes[0])[0].get_xdata()) == 41


def test_datasets_are_never_mixed():
    with pytest.raises(ValueError, match="one dataset"):
        render_robustness_curves(pd.concat([curve("a"), curve("b", dataset_sha256="ef")]), "linf", ["svg"])


def test_same_input_same_bytes_whatever_the_users_settings():
    first = render_robustness_curves(curve("a"), "linf", ["png", "svg", "pdf"])
    with matplotlib.rc_context({"font.size": 20, "axes.facecolor": "red", "svg.hashsalt": None}):
        before = dict(matplotlib.rcParams)
        again = render_robustness_curves(curve("a"), "linf", ["png", "svg", "pdf"])
        assert dict(matplotlib.rcParams) == before
    assert again == first
