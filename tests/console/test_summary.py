"""Summaries on a terminal."""

import io

import pytest
from rich.console import Console

from lrrobust.console import streams
from lrrobust.console.summary import render_table
from lrrobust.report.summary import summarise


@pytest.fixture
def rendered(monkeypatch):
    def render(summary, width=200):
        console = Console(width=width, file=io.StringIO(), force_terminal=True, color_system=None)
        monkeypatch.setattr(streams, "tables", console)
        streams.print_table(render_table(summary))
        return console.file.getvalue()

    return render


def test_shows_the_rows_and_lifts_what_they_share(rendered, make_run):
    text = rendered(summarise([make_run("a", model="one"), make_run("b", model="two[red]")]))
    assert "two[red]" in text and "worst_case" in text and "2/255" in text and "60.0" in text
    assert text.count("sample") == 1 and "incomplete" not in text


def test_cuts_nothing_at_80_columns(rendered, make_run):
    text = rendered(summarise([make_run("a", model="lr_resnet50"), make_run("b", model="resnet50")]), width=80)
    assert "lr_resnet50" in text and "worst_case" in text and "/255" in text
    assert "…" not in text and max(map(len, text.splitlines())) <= 80


def test_tells_apart_runs_of_the_same_model_by_their_fingerprints(rendered, make_run):
    ends = ("0123456789", "abcdef0123")
    text = rendered(summarise([make_run(f"tiny-sample-n5-{end}") for end in ends]), width=80)
    assert all(end in text for end in ends) and "n5-" not in text
    assert "named-by-hand" in rendered(summarise([make_run(f"tiny-sample-n5-{ends[0]}"), make_run("named-by-hand")]))


def test_marks_attacks_that_met_only_what_others_left(rendered, make_run):
    summary = summarise([make_run()])
    assert "†" not in rendered(summary)
    summary["is_cumulative"] = summary["attack"] == "pgd"
    assert "pgd†" in rendered(summary) and "its robust accuracy counts what any of them broke" in rendered(summary)


def test_says_what_an_eps_of_any_means(rendered, make_run):
    summary = summarise([make_run()])
    assert "eps any: what attacks that look for the nearest adversarial" in rendered(summary)
    assert "eps any" not in rendered(summary[summary["eps"] < 1])


def test_names_the_unfinished(rendered, make_run):
    text = rendered(summarise([make_run("done"), make_run("half", planned=2)]))
    assert "incomplete, only the images finished so far: half" in text and "5*" in text


@pytest.mark.parametrize("others", [[], ["trained"]])
def test_models_without_weights(rendered, make_run, others):
    run = make_run("untrained")
    run.manifest["model"]["weights"] = None
    text = rendered(summarise([run, *map(make_run, others)]))
    assert ("\n-  " if others else "weights -") in text
    assert "nan" not in text and "None" not in text and ("V1" in text) == bool(others)


def test_of_nothing(rendered):
    assert rendered(summarise([])).strip() == ""
