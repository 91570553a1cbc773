"""What all figures share: colours, signs, the grid of panels, and how figures become files."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import ArrayLike
from PIL import Image

from lrrobust.plots.small_font import font_families

#: Okabe and Ito's palette without its yellow, which is too pale for lines on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#56B4E9", "#E69F00")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES = ("-", "--", "-.", ":")

NORM_LABELS = {"linf": r"$\ell_\infty$", "l2": r"$\ell_2$", "l1": r"$\ell_1$"}

_STYLE = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.4,
    "lines.markersize": 4.5,
    # A constant, or the identifiers inside an SVG change each time it is written.
    "svg.hashsalt": "lrrobust",
    # Type 42 fonts: journals refuse matplotlib's own choice.
    "pdf.fonttype": 42,
    # Small fonts, for the same reason as `small_font`; they look like mathematics, too.
    "mathtext.fontset": "cm",
}

#: Pixels of a PNG file to the inch; paper takes PDF and SVG.
_PNG_DPI = 160

#: Nobody reads titles in smaller fonts: their middle is left out instead.
_LEAST_SIZE = 5.0

#: Length of a legend's lines, and what lies beside, in font sizes.
_HANDLE, _HANDLE_GAP = 3.5, 3.0

#: Points of a curve that are drawn at most.
_MOST_POINTS = 400

#: Inches: width and height of a panel, and what lies around panels.
_PANEL = (2.2, 1.55)
_LEFT, _RIGHT, _TOP, _BOTTOM, _WIDE_GAP, _HIGH_GAP, _LEGEND_LINE = 0.62, 0.15, 0.62, 0.5, 0.22, 0.52, 0.19


def line_style(place: int) -> dict[str, str]:
    """Colour, marker and dash of the line in that place: told apart in black and white, and by colour-blind people."""
    return {
        "color": COLOURS[place % len(COLOURS)],
        "marker": MARKERS[place % len(MARKERS)],
        "linestyle": LINES[place % len(LINES)],
    }


def build_panels(
    titles: Sequence[str],
    columns: int,
    *,
    title: str,
    ylabel: str,
    xlabels: Mapping[int, str],
    labels: Sequence[str] = (),
    size: tuple[float, float] | None = None,
) -> tuple[Figure, list[Axes]]:
    """A grid of panels that share their vertical axis, with room for a legend below.

    Laid out by fixed margins: matplotlib's constrained layout takes as long as all the drawing.

    Args:
        titles: one for each panel.
        columns: panels side by side.
        title, ylabel: of the whole figure.
        xlabels: panel -> label of its horizontal axis, where it has one.
        labels: what the legend will hold.
        size: of a panel in inches, width and height; None: as usual.
    """
    rows = math.ceil(len(titles) / columns)
    is_wide = columns > 1
    panel_width, panel_height = size or (_PANEL[0] if is_wide else 3.4, _PANEL[1])
    # Panels that label their axis although others are below them need room for it.
    high_gap = _HIGH_GAP + (0.2 if any(place + columns < len(titles) for place in xlabels) else 0.0)
    width = _LEFT + columns * panel_width + (columns - 1) * _WIDE_GAP + _RIGHT
    legend_columns, _ = _fit_legend(list(labels), width, is_wide or size is not None)
    bottom = _BOTTOM + _LEGEND_LINE * math.ceil(len(labels) / legend_columns)
    height = _TOP + rows * panel_height + (rows - 1) * high_gap + bottom
    figure = Figure(figsize=(width, height))
    figure.subplots_adjust(
        left=_LEFT / width, right=1 - _RIGHT / width, top=1 - _TOP / height, bottom=bottom / height,
        wspace=_WIDE_GAP / panel_width, hspace=high_gap / panel_height,
    )  # fmt: skip
    panels = list(figure.subplots(rows, columns, sharey=True, squeeze=False).flat)
    for panel, name in zip(panels, titles):
        # At a place of its own: to find one, matplotlib lays out all axes once more each time it draws.
        text, font_size = _fit_title(name, panel_width + _WIDE_GAP, largest=9.0)
        panel.set_title(text, y=1.0, fontsize=font_size)
    for place, label in xlabels.items():
        panels[place].set_xlabel(label)
    for panel in panels[len(titles) :]:
        panel.remove()
    title, font_size = _fit_title(title, width, largest=10.0)
    figure.suptitle(title, fontsize=font_size, y=1 - 0.1 / height, va="top")
    figure.supylabel(ylabel, fontsize=9, x=0.08 / width, y=(1 - _TOP / height + bottom / height) / 2)
    return figure, panels[: len(titles)]


def _width(text: str) -> float:
    """About how wide a line is, in font sizes; what would run into something, or out of the figure, is set smaller."""
    return sum(1.0 if sign > "\u2e80" else 0.72 if sign.isupper() or sign.isdigit() else 0.6 for sign in text)


def _fit_title(text: str, width: float, largest: float) -> tuple[str, float]:
    """A line, and the font size at which it is so wide at most, in inches."""
    most = 72 * width / _LEAST_SIZE
    if "$" not in text and _width(text) > most:
        half = int(len(text) * most / _width(text) - 2) // 2
        text = f"{text[:half]}…{text[-half:]}"
    return text, min(largest, 72 * width / max(_width(text), 1))


def _fit_legend(labels: list[str], width: float, is_wide: bool) -> tuple[int, float]:
    """How many columns, and the font size at which they are so wide at most."""
    sizes = {}
    for columns in (1, 2) if is_wide else (1,):
        rows = math.ceil(len(labels) / columns) or 1
        longest = [max(map(_width, labels[start : start + rows])) for start in range(0, len(labels), rows)]
        sizes[columns] = min(9.0, 72 * width / (sum(longest) + columns * (_HANDLE + _HANDLE_GAP)))
    return max(sizes.items(), key=lambda item: (item[1], item[0]))


def set_accuracy_axis(panel: Axes, accuracies: ArrayLike) -> None:
    """From 0 to the fifth of 100 % that holds all accuracies, in percent: those of weak models fill their panels, too."""
    highest = float(np.nanmax(np.asarray(accuracies, dtype=np.float64), initial=0.0))
    panel.set_ylim(0, min(100, 20 * max(1, math.ceil(highest / 20 - 1e-9))))


def drawn_points(count: int) -> np.ndarray:
    """Places of the points of a curve that are drawn: all of few, evenly chosen ones of many, the ends among them."""
    return np.unique(np.linspace(0, count - 1, _MOST_POINTS).round().astype(int))


def lowest_panels(count: int, columns: int) -> range:
    """The lowest panel of each column."""
    return range(max(0, count - columns), count)


def add_legend(figure: Figure, handles: Mapping[str, Line2D], is_wide: bool) -> None:
    """Label -> a line that shows it, below the panels."""
    columns, font_size = _fit_legend(list(handles), figure.get_figwidth(), is_wide)
    figure.legend(
        list(handles.values()), list(handles), loc="lower center", bbox_to_anchor=(0.5, 0.0), ncols=columns,
        fontsize=font_size, frameon=False, handlelength=_HANDLE, borderaxespad=0.1, labelspacing=0.25,
    )  # fmt: skip


def render(figure: Figure, kinds: Sequence[str]) -> dict[str, bytes]:
    """Kind ("png", "svg", "pdf") -> the figure as a file of it."""
    contents = {}
    for kind in kinds:
        buffer = io.BytesIO()
        if kind == "png":
            _write_png(figure, buffer)
        else:
            # Dates would make the same figure differ each time.
            figure.savefig(buffer, format=kind, metadata={"Date" if kind == "svg" else "CreationDate": None})
        contents[kind] = buffer.getvalue()
    return contents


def _write_png(figure: Figure, file: io.BytesIO) -> None:
    """With a palette: lines on white have few colours, and files are a third as large."""
    raw = io.BytesIO()
    figure.savefig(raw, format="rgba", dpi=_PNG_DPI)
    width, height = (int(length) for length in figure.get_size_inches() * _PNG_DPI)
    pixels = Image.frombytes("RGBA", (width, height), raw.getvalue()).convert("RGB")
    reduced = pixels.quantize(256, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    # The quick method rounds colours, also that of the paper, which is in the corner.
    palette = reduced.getpalette()
    paper = 3 * reduced.getpixel((0, 0))
    palette[paper : paper + 3] = pixels.getpixel((0, 0))
    reduced.putpalette(palette)
    reduced.save(file, "PNG", dpi=(_PNG_DPI, _PNG_DPI), compress_level=8)


def span(counts) -> str:
    """The numbers of images of several lines as people read them."""
    low, high = min(counts), max(counts)
    return f"{low}" if low == high else f"{low} to {high}"


@contextmanager
def isolated_style() -> Iterator[None]:
    """Matplotlib's own defaults and ours inside, the user's settings again outside."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE | {"font.family": font_families()})
        yield
