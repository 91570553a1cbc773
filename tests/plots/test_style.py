import io

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

from lrrobust.plots.style import COLOURS, LINES, MARKERS, add_legend, build_panels, line_style, render, set_accuracy_axis


@pytest.mark.parametrize(("accuracies", "top"), [([0, 15], 20), ([20], 20), ([20.1, np.nan], 40), ([100], 100), ([0], 20)])
def test_the_accuracy_axis_holds_all_and_no_fifth_more(accuracies, top):
    panel = Figure().subplots()
    set_accuracy_axis(panel, accuracies)
    assert panel.get_ylim() == (0, top)


def test_png_files_have_a_palette_and_white_paper():
    figure = Figure(figsize=(2, 1.5))
    figure.subplots().plot([0, 1], [0, 1], color="#0072B2", linewidth=3)
    image = Image.open(io.BytesIO(render(figure, ["png"])["png"]))
    assert image.mode == "P" and image.size == (320, 240) and image.info["dpi"][0] == pytest.approx(160, abs=0.1)
    colours = {colour: count for count, colour in image.convert("RGB").getcolors()}
    assert max(colours, key=colours.get) == (255, 255, 255)
    # The line's own colour, but for rounding.
    assert any(np.abs(np.subtract(colour, (0x00, 0x72, 0xB2))).max() < 16 for colour, count in colours.items() if count > 500)


def test_long_titles_of_panels_do_not_run_into_each_other():
    names = ["model.py:build (0123456789), incomplete, linf 4/255"] * 3
    figure, panels = build_panels(names, 3, title="", ylabel="", xlabels={})
    renderer = FigureCanvasAgg(figure).get_renderer()
    first, second, third = (panel.title.get_window_extent(renderer) for panel in panels)
    assert first.x0 > 0 and first.x1 < second.x0 and second.x1 < third.x0 and third.x1 < figure.bbox.width
    assert build_panels(["pgd"], 1, title="", ylabel="", xlabels={})[1][0].title.get_fontsize() == 9


@pytest.mark.parametrize("columns", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("name", ["models/a_name_like_those_of_users.py:build_the_final_version_", "WRN_28_10_TRADES_AWP_" * 3])
def test_titles_and_legends_stay_inside_the_figure(columns, count, name):
    labels = [f"{name}{place}" for place in range(count)]
    figure, panels = build_panels([3 * labels[0]] * columns, columns, title=labels[0], ylabel="", xlabels={}, labels=labels)
    add_legend(figure, {label: panels[0].plot([0])[0] for label in labels}, is_wide=columns > 1)
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    extents = [text.get_window_extent(renderer) for text in (figure._suptitle, panels[0].title, figure.legends[0])]
    assert all(extent.x0 >= 0 and extent.x1 <= figure.bbox.width for extent in extents)
    assert panels[0].title.get_fontsize() >= 5 and 0 <= extents[2].y0 < extents[2].y1 < panels[0].bbox.y0


#: Linear RGB as seen without one kind of cone (Machado et al., A Physiologically-based Model for Simulation of Color
#: Vision Deficiency, 2009, table 1, severity 1).
SEEN = {
    "by all cones": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def in_lab(linear):
    """CIE L*a*b* (D65) of linear RGB (n, 3)."""
    xyz = np.clip(linear, 0, 1) @ XYZ.T / XYZ.sum(axis=1)
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], axis=1)


def linear_colours():
    srgb = np.array([to_rgb(colour) for colour in COLOURS])
    return np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)


@pytest.mark.parametrize("matrix", SEEN.values(), ids=list(SEEN))
def test_colours_differ_for_colour_blind_people(matrix):
    lab = in_lab(linear_colours() @ np.asarray(matrix).T)
    apart = np.linalg.norm(lab[:, None] - lab[None], axis=2)[np.triu_indices(len(lab), 1)]
    # About 2.3 is just noticeable on large fields; lines are thin.
    assert apart.min() > 15


def test_lines_stand_out_from_paper_and_differ_in_black_and_white():
    luminance = linear_colours() @ XYZ[1]
    # WCAG 2.1, 1.4.11 asks 3 of graphics; the three first colours, which nearly all figures do with, have it.
    contrast = 1.05 / (luminance + 0.05)
    assert contrast[:3].min() > 3 and contrast.min() > 1.9
    styles = [(style["marker"], style["linestyle"]) for style in map(line_style, range(len(MARKERS) * len(LINES)))]
    assert len(set(styles)) == len(styles)
    # Two lines side by side differ in both, and each of as many as there are markers in its marker.
    assert all(here[0] != there[0] and here[1] != there[1] for here, there in zip(styles, styles[1:]))
    assert len({marker for marker, _ in styles[: len(MARKERS)]}) == len(MARKERS)
