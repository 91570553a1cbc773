import pytest

from lrrobust.errors import StoreError
from lrrobust.report.naming import name_runs, slug


def test_runs_are_told_apart_by_their_folders(make_run):
    assert list(name_runs([make_run("a"), make_run("b")])) == ["a", "b"]
    assert list(name_runs([make_run("x/a"), make_run("y/a")])) == ["x/a", "y/a"]
    with pytest.raises(StoreError, match="/results/a twice"):
        name_runs([make_run("a"), make_run("a")])


def test_names_of_files_hold_nothing_that_a_shell_minds():
    assert slug("Tiny ImageNet: val/a_1") == "tiny-imagenet-val-a-1"
