import io

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from lrrobust.plots.style import build_panels, render, set_accuracy_axis


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
