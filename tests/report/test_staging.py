import json
import os
import signal
import time

import pytest

from lrrobust.errors import StoreError
from lrrobust.report.staging import RECORD_NAME, staging
from lrrobust.results import write_file


def report(folder, *names, content=None):
    """What a report of these files does in the folder."""
    with staging(folder) as staged:
        for name in names:
            (staged.folder / name).write_text(content or name)
    assert staged.written == [folder / name for name in sorted(names)]
    return staged


def names(folder):
    return {path.name for path in folder.iterdir()} - {RECORD_NAME}


def test_what_only_the_last_report_wrote_goes(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    assert report(tmp_path, "old.png", "table.csv").removed == []
    staged = report(tmp_path, "new.png", "table.csv", content="other")
    assert staged.removed == [tmp_path / "old.png"] and staged.kept == []
    assert names(tmp_path) == {"notes.txt", "new.png", "table.csv"} and (tmp_path / "table.csv").read_text() == "other"


def test_a_report_that_fails_leaves_the_last_one_as_it_is(tmp_path):
    report(tmp_path, "page.html", "old.png")
    with pytest.raises(KeyboardInterrupt), staging(tmp_path) as staged:
        (staged.folder / "page.html").write_text("half")
        raise KeyboardInterrupt
    assert names(tmp_path) == {"page.html", "old.png"} and (tmp_path / "page.html").read_text() == "page.html"
    assert report(tmp_path, "page.html").removed == [tmp_path / "old.png"]


def test_what_no_report_wrote_is_kept_under_another_name(tmp_path):
    for name in ("page.html", "same.csv"):
        (tmp_path / name).write_text(name)
    staged = report(tmp_path, "page.html", "same.csv", content="same.csv")
    assert staged.kept == [tmp_path / "page.html.old"] and (tmp_path / "page.html.old").read_text() == "page.html"
    # Nor is what somebody changed since.
    (tmp_path / "page.html").write_text("edited")
    assert report(tmp_path, "page.html", "same.csv").kept == [tmp_path / "page.html.old2"]
    assert report(tmp_path, "page.html", "same.csv", content="third").kept == []


def test_an_interruption_waits_until_all_is_in_place(tmp_path, monkeypatch):
    report(tmp_path, "a.csv", "old.csv")

    def replace(*places):
        os.kill(os.getpid(), signal.SIGINT)
        os.rename(*places)

    monkeypatch.setattr("lrrobust.report.staging.os.replace", replace)
    with pytest.raises(KeyboardInterrupt):
        report(tmp_path, "a.csv", "b.csv", content="new")
    monkeypatch.undo()
    assert names(tmp_path) == {"a.csv", "b.csv"} and (tmp_path / "a.csv").read_text() == "new"
    assert report(tmp_path, "a.csv", content="newer").kept == []


@pytest.mark.parametrize("swapped", [0, 1, 2])
def test_one_that_is_killed_between_two_files_leaves_no_file_of_nobody(tmp_path, monkeypatch, swapped):
    report(tmp_path, "a.csv", "b.csv", "old.csv")
    done = []

    def replace(source, place):
        if place.name != RECORD_NAME:
            if len(done) == swapped:
                os.kill(os.getpid(), signal.SIGKILL)
            done.append(place)
        os.rename(source, place)

    if (child := os.fork()) == 0:
        monkeypatch.setattr("lrrobust.report.staging.os.replace", replace)
        report(tmp_path, "a.csv", "b.csv", "c.csv", content="second")
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert report(tmp_path, "a.csv", "b.csv", "c.csv", content="third").kept == []
    assert {name for name in names(tmp_path) if not name.startswith(".")} == {"a.csv", "b.csv", "c.csv"}


def test_a_link_is_replaced_and_what_it_leads_to_kept(tmp_path):
    (tmp_path / "target.html").write_text("mine")
    (tmp_path / "page.html").symlink_to("target.html")
    report(tmp_path, "page.html")
    assert (tmp_path / "target.html").read_text() == "mine" and not (tmp_path / "page.html").is_symlink()


def test_a_folder_in_the_way_is_said(tmp_path):
    report(tmp_path, "a.csv", "z.csv")
    (tmp_path / "page.html").mkdir()
    with pytest.raises(StoreError, match="page.html is a folder, where a file of the report is to go"):
        report(tmp_path, "a.csv", "page.html", "z.csv", content="other")
    assert (tmp_path / "a.csv").read_text() == "a.csv" and (tmp_path / "z.csv").read_text() == "z.csv"


def test_what_somebody_changed_or_took_away_since_is_left_alone(tmp_path):
    report(tmp_path, "edited.md", "gone.png", "linked.png")
    (tmp_path / "edited.md").write_text("mine")
    (tmp_path / "gone.png").unlink()
    (tmp_path / "linked.png").rename(tmp_path / "target.png")
    (tmp_path / "linked.png").symlink_to("target.png")
    assert report(tmp_path, "new.png").removed == []
    assert names(tmp_path) == {"edited.md", "linked.png", "target.png", "new.png"}


@pytest.mark.parametrize(
    "record", ["", "[1]", '{"../outside.txt": "SHA"}', '{"": "SHA", ".": "SHA", "sub/x": "SHA"}', "[" * 100_000]
)
def test_records_from_elsewhere_remove_nothing(tmp_path, record):
    (tmp_path / "outside.txt").write_text("outside.txt")
    folder = tmp_path / "report"
    report(folder, "outside.txt")
    sha256 = json.loads((folder / RECORD_NAME).read_text())["outside.txt"]
    (folder / RECORD_NAME).write_text(record.replace("SHA", sha256))
    assert report(folder, "new.png").removed == []
    assert (tmp_path / "outside.txt").exists() and names(folder) == {"outside.txt", "new.png"}


def test_what_is_no_file_of_the_reports_is_left_alone(tmp_path):
    (tmp_path / "target.txt").write_text("mine")
    (tmp_path / "link.png").symlink_to("target.txt")
    (tmp_path / "folder").mkdir()
    record = {
        "link.png": None,
        "folder": None,
        "..": None,
        "absent.png": None,
        "a\0b": None,
        "a\0c": "0" * 64,
        RECORD_NAME: "0" * 64,
    }
    (tmp_path / RECORD_NAME).write_text(json.dumps(record))
    assert report(tmp_path, "new.png").removed == []
    assert names(tmp_path) == {"target.txt", "link.png", "folder", "new.png"}
    assert list(json.loads((tmp_path / RECORD_NAME).read_text())) == ["new.png"]


def test_what_killed_ones_left_goes_a_day_later(tmp_path):
    for name in (".lrrobust-killed.tmp", ".lrrobust-running.tmp", ".drafts.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "page.html").touch()
    (tmp_path / ".lrrobust-file.tmp").touch()
    for name in (".lrrobust-killed.tmp", ".lrrobust-file.tmp", ".drafts.tmp"):
        os.utime(tmp_path / name, (time.time() - 2e5,) * 2)
    os.utime(tmp_path / ".lrrobust-running.tmp", (time.time() - 14 * 3600,) * 2)  # by a clock of another zone
    report(tmp_path, "page.html")
    assert names(tmp_path) == {".lrrobust-running.tmp", ".drafts.tmp", "page.html"}


def test_a_name_as_long_as_names_can_be(tmp_path):
    name = "b" * 250 + ".json"
    write_file(tmp_path / name, b"{}")
    assert names(tmp_path) == {name}


def test_files_are_as_readable_as_others(tmp_path):
    before = os.umask(0o022)
    try:
        report(tmp_path / "new", "page.html")
    finally:
        os.umask(before)
    assert (tmp_path / "new" / "page.html").stat().st_mode & 0o777 == 0o644
