import threading

import pytest

from lrrobust import cli
from lrrobust.bench import sharing, suites
from lrrobust.bench.sharing import SharedWork, compare_sharing

SMALL = SharedWork(images=4, side=16, steps=1, chunk_size=2)


def test_command(tmp_path, monkeypatch, capsys):
    """Real processes; that the rows are those of one process it checks itself."""
    monkeypatch.setattr(suites, "compare_sharing", lambda _, repeats, on_turn: compare_sharing(SMALL, repeats=1))
    assert cli.run(["bench", "sharing", "--out", str(tmp_path)]) == 0
    assert "2 processes" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sharing-summary.csv", "sharing-times.csv", "sharing.md"]


def test_other_rows_are_an_error(monkeypatch, tmp_path):
    def evaluate_alone(work, folder, count):
        # The more processes, the more images: as if they had not done the same.
        more = SharedWork(images=2 * count, side=16, steps=1, chunk_size=2)
        sharing._evaluate(more, folder, 0, 1, threading.Barrier(1))
        return 1.0

    monkeypatch.setattr(sharing, "_time_shared", evaluate_alone)
    # Settings of a process of its own.
    monkeypatch.setattr(sharing.torch, "set_num_threads", lambda _: None)
    monkeypatch.setattr(sharing, "settle_process", lambda: None)
    with pytest.raises(RuntimeError, match="2 processes made other rows than one"):
        list(compare_sharing(SMALL, repeats=1))
