import json

import pytest

from lrrobust.report.leftovers import RECORD_NAME, note_unfinished, remove_leftovers


def write(folder, *names):
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_text(name)
    return [folder / name for name in names]


def names(folder):
    return {path.name for path in folder.iterdir()} - {RECORD_NAME}


def test_what_only_the_last_report_wrote_goes(tmp_path):
    write(tmp_path, "notes.txt")
    assert remove_leftovers(tmp_path, write(tmp_path, "old.png", "table.csv")) == []
    assert remove_leftovers(tmp_path, write(tmp_path, "new.png", "table.csv")) == [tmp_path / "old.png"]
    assert names(tmp_path) == {"notes.txt", "new.png", "table.csv"}


def test_what_somebody_changed_or_took_away_since_is_left_alone(tmp_path):
    remove_leftovers(tmp_path, write(tmp_path, "edited.md", "gone.png", "linked.png"))
    (tmp_path / "edited.md").write_text("mine")
    (tmp_path / "gone.png").unlink()
    (tmp_path / "linked.png").rename(tmp_path / "target.png")
    (tmp_path / "linked.png").symlink_to("target.png")
    assert remove_leftovers(tmp_path, write(tmp_path, "new.png")) == []
    assert names(tmp_path) == {"edited.md", "linked.png", "target.png", "new.png"}


@pytest.mark.parametrize("record", ["", "[1]", '{"../outside.txt": "SHA"}', '{"": "SHA", ".": "SHA", "sub/x": "SHA"}', "[" * 100_000])
def test_records_from_elsewhere_remove_nothing(tmp_path, record):
    (outside,) = write(tmp_path, "outside.txt")
    folder = tmp_path / "report"
    remove_leftovers(folder, write(folder, "outside.txt"))
    sha256 = json.loads((folder / RECORD_NAME).read_text())["outside.txt"]
    (folder / RECORD_NAME).write_text(record.replace("SHA", sha256))
    assert remove_leftovers(folder, write(folder, "new.png")) == []
    assert outside.exists() and names(folder) == {"outside.txt", "new.png"}


def test_what_is_no_file_of_the_reports_is_left_alone(tmp_path):
    (tmp_path / "target.txt").write_text("mine")
    (tmp_path / "link.png").symlink_to("target.txt")
    (tmp_path / "folder").mkdir()
    record = {"link.png": None, "folder": None, "..": None, "absent.png": None, "a\0b": None, "a\0c": "0" * 64, RECORD_NAME: "0" * 64}
    (tmp_path / RECORD_NAME).write_text(json.dumps(record))
    assert remove_leftovers(tmp_path, write(tmp_path, "new.png")) == []
    assert names(tmp_path) == {"target.txt", "link.png", "folder", "new.png"}
    # What could not be read when it was written is not recorded either.
    assert remove_leftovers(tmp_path, [tmp_path / "never.png", tmp_path / "new.png"]) == []
    assert list(json.loads((tmp_path / RECORD_NAME).read_text())) == ["new.png"]


def test_what_a_failed_report_wrote_goes_with_the_next(tmp_path):
    remove_leftovers(tmp_path, write(tmp_path, "first.png"))
    note_unfinished(tmp_path, write(tmp_path, "half.png"))
    assert set(remove_leftovers(tmp_path, write(tmp_path, "new.png"))) == {tmp_path / "first.png", tmp_path / "half.png"}
