import json
import re
from xml.etree import ElementTree

import numpy as np
import pytest

from lrrobust.check.baseline import Rule, build_baseline
from lrrobust.check.compare import CheckResult, compare
from lrrobust.check.formats import FORMATS, Output, choose_outputs, printable, write_outputs
from lrrobust.errors import ConfigError, StoreError

KEYS = [("pgd", "linf", eps / 255) for eps in (1, 2)]

HOSTILE = [
    "]]>", "<script>alert(1)</script>", "a\nb", "::error::x", "\n::stop-commands::x", "##[command]x", "a|b", "**x**", "[x](y)",
    "&lt;", "\x1b[31mred", "\x00", "\u202eexe", "%0A::error::x", "`x`", "<!--", "a\\", "\ud800", "[bold]x", "\r::warning::x",
]  # fmt: skip


@pytest.fixture
def result_of(run_of, baseline_of):
    def make(kind, n=200, lost=20, name="model.py:build", keys=None):
        before = {key: np.ones(n, bool) for key in KEYS}
        now = {key: is_robust.copy() for key, is_robust in before.items()}
        options = {}
        if kind == "regressed":
            now[KEYS[1]][:lost] = False
        if kind == "another_comparison":
            options["seed"] = 1
        baseline = baseline_of(before, Rule(weights_may_change=True), models=(name,))
        result = compare(baseline, [run_of(now, models=(name,), keys=keys, hashes=("c", "b"), **options)], "b.json")
        assert result.verdict == kind
        return result

    return make


VERDICTS = ("passed", "regressed", "another_comparison")


@pytest.mark.parametrize("kind", VERDICTS)
def test_json_is_the_result(result_of, kind):
    result = result_of(kind)
    assert CheckResult.model_validate_json(FORMATS["json"](result)) == result


def test_json_is_whole_in_every_encoding(result_of):
    result = result_of("regressed", name="é😀.py:build")
    shown = FORMATS["json"](result).encode("ascii", "backslashreplace")  # as standard output has it
    assert CheckResult.model_validate_json(shown) == result


@pytest.mark.parametrize(("kind", "counts"), list(zip(VERDICTS, [(2, 0, 0), (2, 1, 0), (1, 0, 1)], strict=True)))
def test_junit_counts_and_names(result_of, kind, counts):
    result = result_of(kind)
    root = ElementTree.fromstring(FORMATS["junit"](result).encode())
    (suite,) = root
    for element in (root, suite):
        assert tuple(int(element.get(key)) for key in ("tests", "failures", "errors")) == counts
    cases = suite.findall("testcase")
    assert len(cases) == counts[0]
    if kind == "regressed":
        assert [case.get("name") for case in cases] == ["pgd linf 1/255", "pgd linf 2/255"]
        assert [len(case) for case in cases] == [0, 1]
        failure = cases[1].find("failure")
        assert "fell from 100.0 % to 90.0 % of 200 images" in failure.get("message")
        assert failure.text.splitlines() == [f"lost: ant/{index:04d}.png (broken)" for index in range(20)]
    if kind == "another_comparison":
        assert "seed: 0 in the baseline, 1 now" in cases[0].find("error").get("message")
    assert result.reason in suite.find("system-out").text


def test_every_format_says_the_clean_accuracy_before_and_now(run_of, baseline_of):
    robust = {KEYS[0]: np.arange(100) < 60}
    before, now = run_of(robust), run_of(robust)
    before.rows["is_clean_correct"] = np.arange(100) < 90
    now.rows["is_clean_correct"] = np.arange(100) < 85
    baseline = build_baseline([before], Rule())
    result = compare(baseline, [now], "b.json")
    assert [(c.baseline, c.now, c.n) for c in result.clean] == [(0.9, 0.85, 100)]
    for name in ("text", "junit", "github", "markdown"):
        said = FORMATS[name](result).replace("\\", "").replace("%25", "%")
        assert "clean accuracy of model.py:build: 85.0 % of 100 images, in the baseline 90.0 %" in said, name
    older = baseline.model_copy(update={"models": (baseline.models[0].model_copy(update={"clean_accuracy": None}),)})
    assert "in the baseline not known" in FORMATS["text"](compare(older, [now], "b.json"))


@pytest.mark.parametrize(("kind", "headline"), list(zip(VERDICTS, ["PASSED", "FAILED", "NOT COMPARED"], strict=True)))
def test_text_ends_with_the_verdict(result_of, kind, headline):
    lines = FORMATS["text"](result_of(kind)).splitlines()
    assert lines[-1].startswith(f"{headline}: ")
    if kind == "another_comparison":
        return
    rows = [line.split() for line in lines if line.startswith(("ok ", "fell "))]
    fell = kind == "regressed"
    assert [row[0] for row in rows] == ["ok", "fell" if fell else "ok"]
    unchanged = ["200", "100.0", "100.0", "0", "0"]
    assert [row[-6:-1] for row in rows] == [unchanged, ["200", "100.0", "90.0", "20", "0"] if fell else unchanged]
    assert ("- ant/0007.png: lost at pgd linf 2/255" in lines) == fell
    assert "note: weights of model.py:build changed" in lines


def test_long_lists_are_cut_where_people_read(result_of):
    result = result_of("regressed", lost=55)
    text, markdown, github, junit = (FORMATS[name](result) for name in ("text", "markdown", "github", "junit"))
    assert text.count("lost at") == markdown.count("lost at") == 20
    assert "- and 35 more; --format json=FILE names all" in text
    assert "- and 35 more" in markdown and "and 35 more" in github
    assert junit.count("lost: ") == 55


def test_markdown_is_a_table(result_of):
    markdown = FORMATS["markdown"](result_of("regressed"))
    rows = [line for line in markdown.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {11}
    assert re.match(r"\| fell \| model\.py:build \| pgd \| linf 2/255 \| 200 \| 100\.0 \| 90\.0 \| 20 \| 0 \| ", rows[3])
    assert markdown.startswith("### Robustness: failed\n")


def parse_command(line):
    """An annotation as GitHub's runner reads it."""
    command, properties, message = re.fullmatch(r"::(\w+) ([^:]*)::(.*)", line).groups()
    unescape = {"%25": "%", "%0D": "\r", "%0A": "\n", "%3A": ":", "%2C": ","}
    read = lambda text: re.sub("%[0-9A-F]{2}", lambda m: unescape[m[0]], text)  # noqa: E731
    return command, {key: read(value) for key, value in (p.split("=", 1) for p in properties.split(","))}, read(message)


def test_github_annotates(result_of):
    command, properties, message = parse_command(FORMATS["github"](result_of("regressed")))
    assert (command, properties) == ("error", {"title": "model.py:build: robustness fell"})
    assert "100.0 % to 90.0 %" in message and "lost: ant/0000.png, ant/0001.png" in message
    assert parse_command(FORMATS["github"](result_of("passed")))[0] == "notice"
    assert "seed" in parse_command(FORMATS["github"](result_of("another_comparison")))[2]


@pytest.mark.parametrize("name", HOSTILE, ids=ascii)
def test_hostile_names_stay_text(result_of, name):
    """In the model's name, in an image's, and in what differs."""
    encodable = name.encode("utf-8", "ignore").decode()
    keys = [f"{encodable}/{index}" for index in range(200)]
    plain_lines = {form: len(FORMATS[form](result_of("regressed")).splitlines()) for form in ("text", "markdown", "github")}
    result = result_of("regressed", name=encodable, keys=keys)
    for form, count in plain_lines.items():
        output = FORMATS[form](result)
        lines = output.splitlines()
        assert len(lines) == count, f"{form} has another number of lines"
        assert all(c.isprintable() for line in lines for c in line)
        if form != "github":
            assert not any(line.lstrip().startswith("::") for line in lines)
            assert "##[" not in output
    # Nothing of a name is taken for HTML, a link, emphasis, or the end of a cell.
    markdown = FORMATS["markdown"](result).replace("<details><summary>", "").replace("</summary>", "").replace("</details>", "")
    assert "<" not in markdown
    assert not re.search(r"(?<!\\)[`*\[]", re.sub(r"^\* ", "", markdown, flags=re.MULTILINE))
    rows = [line for line in markdown.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)(?:\\\\)*\|", row)) for row in rows} == {11}
    suite = ElementTree.fromstring(FORMATS["junit"](result).encode())[0]
    assert suite[1].get("classname") == f"lrrobust.{printable(encodable)}"
    assert suite[1][0].text.splitlines()[3] == f"lost: {printable(keys[3])} (broken)"
    _, properties, message = parse_command(FORMATS["github"](result))
    assert properties == {"title": f"{printable(encodable)}: robustness fell"}
    assert printable(keys[3]) in message
    assert json.loads(FORMATS["json"](result))["comparisons"][1]["lost"][3]["key"] == keys[3]


def test_printable_spells_what_cannot_be_shown():
    assert printable("a\n\x1b[1m\ud800é") == "a\\n\\x1b[1m\\ud800é"


class TestOutputs:
    def test_by_environment(self):
        assert choose_outputs([], {}) == [Output("text", None)]
        on_github = {"GITHUB_ACTIONS": "true"}
        assert choose_outputs([], on_github) == [Output("text", None), Output("github", None)]
        assert [o.format for o in choose_outputs(["json"], on_github)] == ["json"]

    def test_by_flag(self, tmp_path):
        asked = ["text", "github", f"junit={tmp_path}/a=b.xml", f"json={tmp_path}/c.json"]
        outputs = choose_outputs(asked, {})
        assert [o.format for o in outputs] == ["text", "github", "junit", "json"]
        assert outputs[2].path == tmp_path / "a=b.xml"

    @pytest.mark.parametrize(
        ("asked", "message"),
        [
            (["xml"], "one of text, json, junit, markdown, github"),
            (["json="], "names no file"),
            (["text", "json"], "json=FILE"),
            (["junit", "json"], "cannot share"),
            (["markdown", "github"], "cannot share"),
        ],
    )
    def test_refused(self, asked, message):
        with pytest.raises(ConfigError, match=message):
            choose_outputs(asked, {})

    def test_files_are_whole_and_the_summary_is_added_to(self, result_of, tmp_path):
        result, shown = result_of("regressed"), []
        summary = tmp_path / "summary.md"
        summary.write_text("before\n")
        outputs = choose_outputs(["text", "github", f"json={tmp_path}/new/r.json", f"markdown={tmp_path}/r.md"], {})
        write_outputs(result, outputs, {"GITHUB_STEP_SUMMARY": str(summary)}, shown.append)
        assert [line.partition("\n")[0][:7] for line in shown] == [FORMATS["text"](result)[:7], "::error"]
        assert CheckResult.model_validate_json((tmp_path / "new" / "r.json").read_text()) == result
        assert summary.read_text() == "before\n" + FORMATS["markdown"](result) + "\n"
        assert {path.name for path in tmp_path.rglob("*")} == {"new", "r.json", "r.md", "summary.md"}

    def test_what_cannot_be_written_keeps_nothing_else_from_it(self, result_of, tmp_path):
        (tmp_path / "file").write_text("")
        outputs = choose_outputs(["github", f"junit={tmp_path}/file/a.xml", f"json={tmp_path}/r.json"], {})
        with pytest.raises(StoreError, match="step summary .*; could not write .*a.xml"):
            write_outputs(result_of("regressed"), outputs, {"GITHUB_STEP_SUMMARY": str(tmp_path)}, lambda _: None)
        assert CheckResult.model_validate_json((tmp_path / "r.json").read_text()).verdict == "regressed"

    def test_a_summary_that_cannot_be_written_is_said(self, result_of, tmp_path):
        with pytest.raises(StoreError, match="step summary"):
            write_outputs(result_of("passed"), [Output("github", None)], {"GITHUB_STEP_SUMMARY": str(tmp_path)}, print)
