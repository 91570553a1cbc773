import pytest

from lrrobust import cli
from lrrobust.bench import suites
from lrrobust.bench.run_store import Scale, simulate_run
from lrrobust.results import load_run

SMALL = Scale(images=100, attacks=3, budgets=2, ranks=20, restart_ranks=3, death_rate=0.25, chunk_size=8)


def test_every_part_is_computed_once_though_processes_die(tmp_path):
    frame = simulate_run(tmp_path / "run", SMALL).set_index("name")
    # 20 of 39 parts are in hand at first, and 5 processes die with theirs.
    assert frame.parts.to_dict() == {"1st session": 34, "2nd session": 5, "load_run": 39, "report": 39}
    run = load_run(tmp_path / "run")
    assert run.is_complete and len(run.rows) == 100 * 3 * 2
    assert not run.rows.duplicated(["index", "attack", "eps"]).any()
    assert (frame.take_s.dropna() > 0).all() and frame.wall_s["report"] > 0
    # Parts, manifest, lock: leases of the dead are gone in the end.
    assert frame.files.to_dict() == {"1st session": 34 + 2 + 5, "2nd session": 41, "load_run": 41, "report": 41}
    assert (tmp_path / "report" / "report.html").is_file()


def test_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(suites, "Scale", lambda: SMALL)
    assert cli.run(["bench", "store", "--out", str(tmp_path)]) == 0
    assert "2nd session" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"store.md", "store-summary.csv"}


def test_a_part_computed_twice_is_an_error(tmp_path, monkeypatch):
    from lrrobust.results.leases import Leases

    # Whoever asks gets it.
    monkeypatch.setattr(Leases, "acquire", lambda self, name: True)
    monkeypatch.setattr(Leases, "taken", lambda self: set())
    with pytest.raises(RuntimeError, match="parts computed for 39 in the plan"):
        simulate_run(tmp_path / "run", SMALL)
