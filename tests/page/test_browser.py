"""The page in a real browser; skipped where there is none (pip install 'lrrobust[browser]')."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

BROWSER = Path(__file__).with_name("browser.py")


def why_no_browser():
    # The package alone says little: newer ones come without the engine, others lack libraries of the system.
    if importlib.util.find_spec("PySide6") is None:
        return "needs a browser: pip install 'lrrobust[browser]'"
    code = "import PySide6.QtWebEngineWidgets"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    return None if done.returncode == 0 else f"Qt's browser cannot be loaded: {done.stderr.strip().splitlines()[-1]}"


@pytest.fixture(scope="module", autouse=True)
def browser():
    if reason := why_no_browser():
        pytest.skip(reason)


@pytest.fixture
def visit(make_run, write, verdicts, tmp_path):
    """Writes a page of two runs, opens it, and returns what the script found there."""
    runs = [make_run("a"), make_run("b", model="other")]
    page, *_ = write(runs, tmp_path / "out", verdicts)

    def open_page(script="null", *options):
        out = tmp_path / "found.json"
        command = [sys.executable, str(BROWSER), str(page), str(out), "--script", script, *options]
        done = subprocess.run(command, capture_output=True, text=True, timeout=90)
        assert done.returncode == 0, done.stderr
        found = json.loads(out.read_text())
        assert found["is_loaded"] and found["console"] == []
        assert [address for address in found["requests"] if not address.startswith("data:")] == [page.as_uri()]
        return found["result"]

    return open_page


def test_loads_in_silence_and_shows_the_verdict(visit):
    script = """(() => {
      const images = Array.from(document.images);
      return [document.querySelector(".word").innerText, images.length, images.filter((image) => !image.naturalWidth).length,
       document.documentElement.scrollWidth <= window.innerWidth, document.querySelectorAll("*").length];
    })()"""
    word, images, broken, fits, elements = visit(script)
    assert word == "✗ refuted" and images > 10 and broken == 0 and fits
    assert elements < 2000


def in_pixels(text):
    return float(text.removesuffix("/255")) / (255 if text.endswith("/255") else 1)


def test_a_heading_sorts_its_table_and_says_so(visit):
    script = """(() => {
      const table = Array.from(document.querySelectorAll("table")).find((t) => t.tHead.innerText.includes("robust %"));
      const heading = Array.from(table.tHead.rows[0].cells).find((cell) => cell.innerText.startsWith("median distance"));
      const found = [];
      for (let press = 0; press < 3; press += 1) {
        const values = Array.from(table.tBodies[0].rows, (row) => row.cells[heading.cellIndex].innerText);
        found.push([heading.ariaSort, values]);
        heading.querySelector("button").focus();
        document.activeElement.click();  // what the keys Enter and Space do to a button
      }
      return found;
    })()"""
    (before, first), (ascending, second), (descending, third) = visit(script)
    assert (before, ascending, descending) == ("none", "ascending", "descending")
    assert sorted(first) == sorted(second) == sorted(third) and first != second
    # By value: 0.9/255 is nearer than 0.4, and infinity is last, or first when descending.
    assert second == sorted(second, key=in_pixels) and third == sorted(third, key=in_pixels, reverse=True)
    assert second != sorted(second) and "inf" in second


def test_classes_are_drawn_when_opened_and_sort_too(visit, hostile):
    script = """(async () => {
      const details = document.querySelector("details[data-classes]");
      const before = details.querySelectorAll("td").length;
      details.open = true;
      await new Promise((done) => setTimeout(done, 200));
      const names = () => Array.from(details.querySelectorAll("tbody tr"), (row) => row.cells[0].innerText);
      window.found = [before, names(), details.querySelector("tbody td:nth-child(4)").innerText];
      details.querySelector("th button").click();
      window.found.push(names(), document.scripts.length);
    })()"""
    # Qt does not wait for promises: the page keeps what was found.
    before, drawn, robust, by_name, scripts = visit(script, "--then", "window.found")
    assert before == 0 and drawn == ["bee", hostile, "ant"] and robust == "100.0 (34.2-100.0)"
    assert by_name == [hostile, "ant", "bee"] and scripts == 2


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_and_figures_stand_out_from_the_paper(visit, tmp_path, scheme):
    picture = tmp_path / f"{scheme}.png"
    options = ["--screenshot", str(picture), "--height", "700", *(["--dark"] if scheme == "dark" else [])]
    script = """(() => {
      const figure = document.querySelector("figure.curves img");
      figure.scrollIntoView();
      const box = figure.getBoundingClientRect();
      return [box.left, box.top, box.right, box.bottom].map(Math.round);
    })()"""
    box = visit(script, *options)
    page = np.asarray(Image.open(picture).convert("L"), dtype=float)
    figure = np.asarray(Image.open(picture).crop(box).convert("L"), dtype=float)
    for grey in (page, figure):
        paper = np.median(grey)
        assert paper > 240 if scheme == "light" else paper < 40
        assert np.percentile(abs(grey - paper), 99.5) > 120


#: Text, size in points and share of ink of every page of a PDF file; none of pytest's own process, as the browser.
READ_PDF = """
import json, os, sys
os.environ["QT_QPA_PLATFORM"] = "offscreen"
from PySide6.QtCore import QSize
from PySide6.QtGui import QGuiApplication, QImage
from PySide6.QtPdf import QPdfDocument
application = QGuiApplication(sys.argv[:1])
document = QPdfDocument()
assert document.load(sys.argv[1]) is QPdfDocument.Error.None_
pages = []
for place in range(document.pageCount()):
    size = document.pagePointSize(place)
    image = document.render(place, QSize(int(size.width()), int(size.height()))).convertToFormat(QImage.Format_ARGB32)
    # Paper is what nothing was painted on.
    right = [x for x in range(image.width()) for y in range(0, image.height(), 2)
             if (colour := image.pixelColor(x, y)).alpha() > 128 and colour.lightness() < 128]
    pages.append([document.getAllText(place).text(), size.width(), max(right, default=0), len(right)])
print(json.dumps(pages))
"""


def test_prints(visit, tmp_path):
    file = tmp_path / "page.pdf"
    # What a dark screen shows is printed dark on light all the same.
    visit("null", "--pdf", str(file), "--dark")
    done = subprocess.run([sys.executable, "-c", READ_PDF, str(file)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    pages = json.loads(done.stdout)
    texts = [" ".join(text.split()) for text, *_ in pages]
    assert "Adversarial robustness report" in texts[0] and "✗ refuted" in texts[0]
    whole = " ".join(texts)
    assert all(heading in whole for heading in ("Paired differences that decide", "Robust accuracy", "Provenance"))
    # Nothing is cut off at the right (Qt prints without margins), and paper stays paper.
    assert all(right < width - 1 for _, width, right, _ in pages)
    assert all(ink < 0.2 * width * width for _, width, _, ink in pages)
    assert len(pages) < 12
