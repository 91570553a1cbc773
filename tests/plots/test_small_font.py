import io
import tempfile

import matplotlib
import numpy as np
import pytest
from matplotlib import font_manager
from matplotlib.ft2font import FT2Font
from PIL import Image

from lrrobust.plots import small_font
from lrrobust.plots.style import build_panels, isolated_style, render

TEXT = "AVATo fi, 0.25 % − ε é – “x” → ≤ 4/255"


@pytest.fixture
def fresh():
    """Nothing made before counts, nor what the test makes afterwards."""
    small_font.font_families.cache_clear()
    yield
    small_font.font_families.cache_clear()


def draw(kind="png"):
    with isolated_style():
        figure, _ = build_panels([TEXT], 1, title=TEXT, ylabel=TEXT, xlabels={0: TEXT})
        return render(figure, [kind])[kind]


def test_figures_look_as_with_the_whole_font(monkeypatch):
    small = draw()
    monkeypatch.setattr("lrrobust.plots.style.font_families", lambda: ["DejaVu Sans"])
    pixels = [np.asarray(Image.open(io.BytesIO(content)).convert("RGB"), dtype=int) for content in (small, draw())]
    # But for what reading the same outlines anew rounds.
    assert pixels[0].shape == pixels[1].shape and abs(pixels[0] - pixels[1]).max() < 16


def test_the_font_holds_what_figures_write_and_little_else():
    family, whole = small_font.font_families()
    path, original = (font_manager.findfont(name, fallback_to_default=False) for name in (family, whole))
    letters, most = (set(FT2Font(name).get_charmap()) for name in (path, original))
    assert {ord(letter) for letter in TEXT} <= letters < most and len(letters) < len(most) / 4


def test_pdf_files_hold_the_small_font():
    assert b"LRRobustSans" in (content := draw("pdf")) and b"DejaVuSans" not in content


def test_other_letters_come_from_the_whole_font():
    with isolated_style():
        figure, _ = build_panels(["ж"], 1, title="", ylabel="", xlabels={})
        assert b"DejaVuSans" in render(figure, ["pdf"])["pdf"]


def test_where_no_file_can_be_written_the_whole_font_does_alone(monkeypatch, fresh):
    def refuse(**_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    assert small_font.font_families() == ["DejaVu Sans"]
    assert b"DejaVuSans" in draw("pdf")


def test_fonts_of_the_user_stay_as_they_were():
    before = matplotlib.rcParams["font.family"]
    draw()
    assert matplotlib.rcParams["font.family"] == before
