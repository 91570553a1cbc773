"""What came of a check, for people, machines and GitHub. Names are data: whatever they hold, they stay text.

| format | reader |
|---|---|
| `text` | people at a terminal |
| `json` | programs: a `CheckResult` |
| `junit` | test reports of CI services: one test case a comparison |
| `markdown` | people, in a pull request |
| `github` | GitHub Actions: an annotation for each regression; with `GITHUB_STEP_SUMMARY` set, Markdown is added to that file |
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from lrrobust.check.compare import CheckResult, CleanAccuracy, Comparison
from lrrobust.errors import ConfigError, StoreError
from lrrobust.results import write_file

#: Images named one by one where people read; `json` and `junit` name all.
_IMAGES_SHOWN = 20

#: GitHub shows ten annotations of a step at most.
_ANNOTATIONS_SHOWN = 10

_HEADLINES = {"passed": "PASSED", "regressed": "FAILED", "another_comparison": "NOT COMPARED"}


class Output(NamedTuple):
    """A format and where it goes; None: standard output."""

    format: str
    path: Path | None


def choose_outputs(asked: Sequence[str], environment: Mapping[str, str]) -> list[Output]:
    """What to write: as asked for, else by environment.

    Args:
        asked: `FORMAT` or `FORMAT=FILE` each; without any, `text`, and `github` too where GITHUB_ACTIONS is "true".
        environment: such as `os.environ`.

    Raises:
        ConfigError: an unknown format; a machine's format shares standard output; or no file name after `=`.

    >>> choose_outputs(["text", "json=out.json"], {})[1].format
    'json'
    """
    if not asked:
        return [Output("text", None), *([Output("github", None)] if environment.get("GITHUB_ACTIONS") == "true" else [])]
    outputs = []
    for each in asked:
        name, equals, path = each.partition("=")
        if name not in FORMATS:
            raise ConfigError(f"--format must be one of {', '.join(FORMATS)}, or one with =FILE, got {each!r}")
        if equals and not path:
            raise ConfigError(f"--format {each!r} names no file: write {name}=FILE, or {name} for standard output")
        outputs.append(Output(name, Path(path) if path else None))
    shown = [output.format for output in outputs if output.path is None]
    alone = [name for name in shown if name in ("json", "junit", "markdown")]
    if alone and len(shown) > 1:
        raise ConfigError(f"--format {', '.join(shown)} cannot share standard output: give {alone[0]} a file, {alone[0]}=FILE")
    return outputs


def write_outputs(
    result: CheckResult, outputs: Sequence[Output], environment: Mapping[str, str], show: Callable[[str], None]
) -> None:
    """Writes every output; files whole or not at all. One that cannot be written keeps none from being written.

    Raises:
        StoreError: files that cannot be written.
    """
    summary = environment.get("GITHUB_STEP_SUMMARY")
    failures = []
    for output in outputs:
        text = FORMATS[output.format](result)
        try:
            if output.path is None:
                show(text)
            else:
                write_file(output.path, text.encode())
            if output.format == "github" and summary:
                _add_to_summary(Path(summary), render_markdown(result))
        except StoreError as failure:
            failures.append(str(failure))
    if failures:
        raise StoreError("; ".join(failures))


def _add_to_summary(path: Path, markdown: str) -> None:
    # Other commands of the step write to the same file.
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(markdown + "\n")
    except OSError as error:
        raise StoreError(f"cannot add to the step summary {path}: {error.strerror}") from None


def render_text(result: CheckResult) -> str:
    """A table, the images that flipped, and the verdict in the last line."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE, padding=0, show_edge=False)
    for heading in ("", "model", "attack", "eps"):
        table.add_column(heading, no_wrap=True)
    for heading in ("n", "before %", "now %", "lost", "gained", "p (Holm)"):
        table.add_column(heading, justify="right", no_wrap=True)
    for c in result.comparisons:
        cells = [_state(c), c.model, c.attack, _eps(c), *_numbers(c)]
        table.add_row(*(Text(_printable_line(cell), style="bold red" if c.is_regression else "") for cell in cells))
    # Lines as long as they need to be: nothing of a name or number is cut, and no line begins within a name.
    console = Console(file=io.StringIO(), width=10_000, color_system=None)
    if result.comparisons:
        console.print(table)
    lines = [line.rstrip() for line in console.file.getvalue().splitlines()]
    lines += ["", *(_printable_line(_clean(c)) for c in result.clean)] if result.clean else []
    flips = list(_flipped_images(result.comparisons))
    if flips:
        lines += ["", "flipped images:", *(f"- {_printable_line(flip)}" for flip in flips[:_IMAGES_SHOWN])]
    if len(flips) > _IMAGES_SHOWN:
        lines.append(f"- and {len(flips) - _IMAGES_SHOWN} more; --format json=FILE names all")
    lines += [f"note: {_printable_line(note)}" for note in result.notes]
    lines += ["", f"{_HEADLINES[result.verdict]}: {_printable_line(result.reason)}"]
    return "\n".join(lines).lstrip("\n")


def render_json(result: CheckResult) -> str:
    # In ASCII, which standard output holds whatever its encoding is.
    return json.dumps(json.loads(result.model_dump_json()), indent=1)


def render_junit(result: CheckResult) -> str:
    """One test case for each comparison; a single case with an error where nothing could be compared."""
    failures = sum(c.is_regression for c in result.comparisons)
    errors = int(result.verdict == "another_comparison")
    tests = len(result.comparisons) + errors
    counts = {"tests": f"{tests}", "failures": f"{failures}", "errors": f"{errors}", "skipped": "0"}
    root = ElementTree.Element("testsuites", counts)
    suite = ElementTree.SubElement(root, "testsuite", {"name": printable(f"lrrobust check {result.baseline}"), **counts})
    for c in result.comparisons:
        case = ElementTree.SubElement(
            suite, "testcase", {"classname": printable(f"lrrobust.{c.model}"), "name": printable(f"{c.attack} {_eps(c)}")}
        )
        if c.is_regression:
            failure = ElementTree.SubElement(case, "failure", {"type": "regression", "message": printable(_sentence(c))})
            failure.text = "\n".join(printable(f"lost: {flip.key} ({flip.outcome})") for flip in c.lost)
    if errors:
        case = ElementTree.SubElement(suite, "testcase", {"classname": "lrrobust", "name": "same comparison as the baseline"})
        ElementTree.SubElement(case, "error", {"type": "another comparison", "message": printable(result.reason)})
    output = ElementTree.SubElement(suite, "system-out")
    output.text = "\n".join(printable(line) for line in (*map(_clean, result.clean), *result.notes, result.reason))
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="utf-8", xml_declaration=True).decode()


def render_markdown(result: CheckResult) -> str:
    lines = [f"### Robustness: {_HEADLINES[result.verdict].lower()}", "", _markdown(result.reason), ""]
    if result.comparisons:
        lines += ["| | model | attack | eps | n | before % | now % | lost | gained | p (Holm) |"]
        lines += ["|:--|:--|:--|:--|--:|--:|--:|--:|--:|--:|"]
    for c in result.comparisons:
        cells = (_state(c), c.model, c.attack, _eps(c), *_numbers(c))
        lines.append(f"| {' | '.join(_markdown(cell) for cell in cells)} |")
    lines += ["", *(f"* {_markdown(_clean(c))}" for c in result.clean)] if result.clean else []
    flips = list(_flipped_images(result.comparisons))
    if flips:
        lines += ["", f"<details><summary>{len(flips)} flipped images</summary>", ""]
        lines += [f"- {_markdown(flip)}" for flip in flips[:_IMAGES_SHOWN]]
        lines += [f"- and {len(flips) - _IMAGES_SHOWN} more"] if len(flips) > _IMAGES_SHOWN else []
        lines += ["", "</details>"]
    lines += ["", *(f"* {_markdown(note)}" for note in result.notes)] if result.notes else []
    return "\n".join(lines) + "\n"


def render_github(result: CheckResult) -> str:
    """Workflow commands: an error for each regression, or for another comparison; a notice where all is well."""
    clean = "".join(f"; {_clean(c)}" for c in result.clean)
    if result.verdict == "passed":
        return _annotation("notice", "Robustness", "; ".join((result.reason + clean, *result.notes)))
    if result.verdict == "another_comparison":
        return _annotation("error", "Robustness not compared", result.reason)
    fallen = [c for c in result.comparisons if c.is_regression]
    lines = []
    for c in sorted(fallen, key=lambda c: -c.fall)[:_ANNOTATIONS_SHOWN]:
        names = ", ".join(flip.key for flip in c.lost[:_IMAGES_SHOWN])
        more = f" and {len(c.lost) - _IMAGES_SHOWN} more" if len(c.lost) > _IMAGES_SHOWN else ""
        lines.append(_annotation("error", f"{c.model}: robustness fell", f"{_sentence(c)}{clean}; lost: {names}{more}"))
    return "\n".join(lines)


#: Name -> result as text.
FORMATS: dict[str, Callable[[CheckResult], str]] = {
    "text": render_text,
    "json": render_json,
    "junit": render_junit,
    "markdown": render_markdown,
    "github": render_github,
}


def printable(text: str) -> str:
    """The text in one line: what is not printable is spelled, as in `\\n`, and so is what XML cannot hold.

    >>> printable("a\\nb")
    'a\\\\nb'
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _printable_line(text: str) -> str:
    # GitHub takes `##[` anywhere in the output of a step for a command; `::` only where a line begins, and
    # lines never begin with a name.
    return printable(text).replace("##[", "# #[")


def _markdown(text: str) -> str:
    text = re.sub(r"([\\`*_{}\[\]()#+!|@~$-])", r"\\\1", printable(text))
    # After the backslashes: an escaped & would leave what follows it as it was.
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _annotation(level: str, title: str, message: str) -> str:
    def escaped(text: str) -> str:
        return printable(text).replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")

    # Within a property two more characters have a meaning.
    return f"::{level} title={escaped(title).replace(':', '%3A').replace(',', '%2C')}::{escaped(message)}"


def _state(c: Comparison) -> str:
    return "fell" if c.is_regression else "ok"


def _eps(c: Comparison) -> str:
    return f"{c.norm} {c.shown_eps}"


def _numbers(c: Comparison) -> list[str]:
    p = "-" if c.p_holm is None else f"{c.p_holm:.2g}"
    before, now = f"{100 * c.baseline_robust_accuracy:.1f}", f"{100 * c.robust_accuracy:.1f}"
    return [f"{c.n}", before, now, f"{len(c.lost)}", f"{len(c.gained)}", p]


def _clean(c: CleanAccuracy) -> str:
    before = "not known" if c.baseline is None else f"{100 * c.baseline:.1f} %"
    return f"clean accuracy of {c.model}: {100 * c.now:.1f} % of {c.n} images, in the baseline {before}"


def _sentence(c: Comparison) -> str:
    return (
        f"{c.model} under {c.attack}, {_eps(c)}: robust accuracy fell from {100 * c.baseline_robust_accuracy:.1f} % to "
        f"{100 * c.robust_accuracy:.1f} % of {c.n} images ({len(c.lost)} lost, {len(c.gained)} gained, p = {c.p_holm:.2g} "
        "after Holm)"
    )


def _flipped_images(comparisons: Sequence[Comparison]) -> Iterator[str]:
    """A line for each image and model: where it was lost and gained; most comparisons first."""
    found: dict[tuple[str, str], dict[str, list[str]]] = {}
    for c in comparisons:
        for word, flips in (("lost", c.lost), ("gained", c.gained)):
            for flip in flips:
                said = found.setdefault((c.model, flip.key), {})
                outcome = " (wrong when clean)" if flip.outcome == "wrong_when_clean" else ""
                said.setdefault(word + outcome, []).append(f"{c.attack} {_eps(c)}")
    several = len({c.model for c in comparisons}) > 1
    for (model, key), said in sorted(found.items(), key=lambda item: -sum(map(len, item[1].values()))):
        where = "; ".join(f"{word} at {', '.join(places)}" for word, places in said.items())
        yield f"{f'{model}: ' if several else ''}{key}: {where}"
