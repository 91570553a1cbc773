"""Matplotlib's own font cut down to the letters of figures, since a PDF spends most of its time on cutting it to size."""

from __future__ import annotations

import atexit
import logging
import shutil
import tempfile
from functools import cache
from pathlib import Path

from fontTools.subset import Options, Subsetter
from fontTools.ttLib import TTFont
from matplotlib import font_manager

_log = logging.getLogger(__name__)

#: It warns of the dates inside matplotlib's fonts.
logging.getLogger("fontTools").setLevel(logging.ERROR)

_WHOLE = "DejaVu Sans"

#: A name of its own: cut fonts must not be taken for the whole one.
_FAMILY = "LRRobust Sans"

#: Latin with accents, Greek, dashes, quotes, and some arrows and signs of mathematics.
_CHARACTERS = [
    *range(0x20, 0x180), *range(0x391, 0x3CA), *range(0x2010, 0x2040), *range(0x2190, 0x2194), *map(ord, "∈∞−≈≠≤≥"),
]  # fmt: skip


@cache
def font_families() -> list[str]:
    """Families of `font.family`, the small one first; characters that it lacks are taken from the whole one.

    The small one is a temporary file that lives as long as this process. Where none can be written, the whole font
    does alone: figures look the same, and take longer.
    """
    try:
        folder = Path(tempfile.mkdtemp(prefix="lrrobust-font-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        path = folder / "small.ttf"
        _write_small(Path(font_manager.findfont(_WHOLE, fallback_to_default=False)), path)
        font_manager.fontManager.addfont(path)
    except (OSError, ValueError) as error:
        _log.debug("no small font: %s", error)
        return [_WHOLE]
    return [_FAMILY, _WHOLE]


def _write_small(whole: Path, small: Path) -> None:
    # Older versions of matplotlib read the old table of kerning.
    options = Options(legacy_kern=True, name_IDs=[1, 2, 4, 6], notdef_outline=True, recalc_timestamp=False)
    with TTFont(whole, recalcTimestamp=False) as font:
        subsetter = Subsetter(options)
        subsetter.populate(unicodes=_CHARACTERS)
        subsetter.subset(font)
        for record in font["name"].names:
            record.string = {1: _FAMILY, 2: "Book", 4: _FAMILY, 6: _FAMILY.replace(" ", "")}[record.nameID]
        font.save(small)
