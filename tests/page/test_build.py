import re
from html.parser import HTMLParser

import pandas as pd
import pytest

from lrrobust.results import load_run


class Elements(HTMLParser):
    """What a browser makes of a page: tags with attributes, and text by the tag it stands in."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts, self._open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self._open.append(tag)

    def handle_endtag(self, tag):
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data):
        self.texts.append((self._open[-1] if self._open else "", data))

    def named(self, name):
        return [attributes for tag, attributes in self.tags if tag == name]

    @property
    def visible(self):
        text = " ".join(text for tag, text in self.texts if tag not in ("script", "style", "title"))
        return re.sub(r"\s+", " ", text)


@pytest.fixture
def page(make_run, write, verdicts, tmp_path):
    def page(*runs, verdicts=verdicts):
        path, *_ = write(runs or [make_run("a"), make_run("b", model="other")], tmp_path / "out", verdicts)
        return path.read_text(encoding="utf-8")

    return page


def test_hostile_names_stay_text(page, make_run, hostile):
    text = page(make_run("a", model=hostile), make_run("b", model="other"))
    elements = Elements(text)
    assert [tag.get("type") for tag in elements.named("script")] == ["application/json", None]
    assert len(elements.named("style")) == 1
    assert not [name for _, attributes in elements.tags for name in attributes if name.startswith("on")]
    assert "alert('x')" in elements.visible


def test_nothing_comes_from_outside(page):
    elements = Elements(page())
    addresses = [
        attributes[name] for _, attributes in elements.tags for name in ("src", "href", "srcset", "data") if name in attributes
    ]
    assert len(addresses) > 10
    assert all(address.startswith(("data:", "#")) for address in addresses)
    assert not re.search(r"@import|url\(", "".join(text for tag, text in elements.texts if tag == "style"))
    (policy,) = (tag["content"] for tag in elements.named("meta") if "http-equiv" in tag)
    assert "default-src 'none'" in policy and "unsafe-eval" not in policy and "script-src 'sha256-" in policy


def test_the_verdict_comes_first_with_reasons_and_safeguards(page):
    elements = Elements(page())
    assert [text for tag, text in elements.texts if tag in ("h2", "h3") and "tiny is" not in text] == [
        "Verdict", "Safeguards", "Paired differences that decide", "Area under the robustness curve",
        "Distance of the nearest adversarial image", "Evidence", "sample, n = 6", "Robustness curves",
        "Worst case of each model", "Robust accuracy",
        "Did the attacks work?", "Adversarial images", "By class", "Provenance",
    ]  # fmt: skip
    visible = elements.visible
    assert "✗ refuted" in visible and "The control is more robust." in visible
    assert "another was not judged: No run of vgg16." in visible
    assert "diagnostics not available" in visible and "attack diagnostics not available" in visible
    assert "✗ failed" in visible and "✓ passed" in visible and "? not checked" in visible


def test_provenance_says_what_the_attacks_were_told(make_run, write, tmp_path):
    run = make_run("told")
    run.manifest["attacks"][0] |= {"eps": [1 / 255, 2 / 255], "steps": 20, "random_start": True, "target": None}
    run.manifest["dataset"]["left_out_count"] = 7
    write([run], tmp_path / "out")
    visible = Elements((tmp_path / "out" / "report.html").read_text(encoding="utf-8")).visible
    assert "norm linf; kind pgd; eps 1/255, 2/255; steps 20; random_start true" in visible
    assert re.search(r"side of the images in pixels\s*8\b", visible) and re.search(r"left out\s*7\b", visible)


def test_numbers_of_the_verdict(page):
    text = page()
    cells = re.findall(r"<td[^>]*>([^<]*)</td>", text)
    decisive = cells[cells.index("all images") - 3 :][:14]
    assert decisive == [
        "pgd", "linf", "1/255", "all images", "6", "25.0", "50.0", "-25.0", "-60.0 to +20.0", "1", "3", "0.625",
        "1.000", "none",
    ]  # fmt: skip
    assert "31.0" in cells and "4.0e-04" in cells and "-0.50" in cells and "inf" in cells
    assert '<td data-value="Infinity">none</td>' in text


def test_files_beside_the_page(make_run, write, verdicts, tmp_path):
    written = write([make_run("a")], tmp_path / "out", verdicts)
    assert sorted(written) == sorted((tmp_path / "out").iterdir())
    stems = {path.stem for path in written}
    assert len(stems) == 4 and {"report", "per_class", "comparisons"} < stems
    comparisons = pd.read_csv(tmp_path / "out" / "comparisons.csv")
    assert comparisons["difference"].tolist() == [-0.25, -0.25]
    assert comparisons["smallest_detectable"].isna().tolist() == [True, False]
    row = "pgd | linf | 1/255 | both correct | 6 | 25.0 | 50.0 | -25.0 | -60.0 to +20.0 | 1 | 3 | 0.625 | 1.000 | 31.0"
    assert f"| {row} |" in (tmp_path / "out" / "comparisons.md").read_text()
    assert row.replace("|", "&") + " \\\\\n" in (tmp_path / "out" / "comparisons.tex").read_text()
    without = write([make_run("a")], tmp_path / "other")
    assert {path.name for path in without} == {"report.html", "per_class.csv"}


def test_without_verdicts(page):
    assert "No claim was judged on these runs" in page(verdicts=None)


def test_commands_and_provenance(page):
    visible = Elements(page()).visible
    assert "lrrobust eval --model tiny --n 6 lrrobust eval --model other --n 6 lrrobust report 'my runs' --out out" in visible
    assert "1234abc" in visible and "torch 2.13.0" in visible and "ab" * 32 in visible and "/home/me" not in visible


def test_what_a_reader_must_know(page, make_run):
    run = make_run("half", planned=2)
    (run.folder / "parts" / "cw-000000-000006.parquet").unlink()
    assert "incomplete, 1 of 2 parts" in Elements(page(load_run(run.folder))).visible


def test_a_run_without_any_part(page, make_run):
    run = make_run("empty", with_examples=False)
    for path in (run.folder / "parts").iterdir():
        path.unlink()
    visible = Elements(page(load_run(run.folder))).visible
    assert "No part is finished yet." in visible and "Nothing to draw yet." in visible


def test_long_names_break(page, make_run):
    name = "long_" * 20
    built = page(make_run("a", model=name))
    assert f'<td class="prose">{name}</td>' in built
    assert re.search(r"td\.prose[^}]*overflow-wrap: anywhere", built)


def test_the_same_page_each_time(page, make_run):
    runs = [make_run("a"), make_run("b", model="other")]
    assert page(*runs) == page(*runs)
