import pandas as pd
import pytest

from lrrobust import cli
from lrrobust.bench import suites
from lrrobust.bench.local_relation import Stage, compare_operations
from lrrobust.bench.suites import format_cell


def test_command_writes_times_with_the_hardware(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        suites, "compare_operations", lambda **options: compare_operations((Stage("tiny", 8, 6),), batch_size=1, with_memory=False, **options)
    )
    assert cli.run(["bench", "operation", "--repeats", "3", "--out", str(tmp_path)]) == 0
    assert "operation: medians of 3 interleaved rounds" in capsys.readouterr().out
    times = pd.read_csv(tmp_path / "operation-times.csv")
    assert (times.groupby("name").size() == 3).all() and times.processor.notna().all() and times.threads.notna().all()
    summary = pd.read_csv(tmp_path / "operation-summary.csv").set_index("name")
    assert summary.ratio["unfold"] == 1
    assert summary.median_s["cpu"] == times[times.name == "cpu"].wall_s.median()


def test_attack_loop_needs_no_more_than_names(tmp_path, monkeypatch, capsys):
    assert cli.run(["bench", "atack-loop", "--out", str(tmp_path)]) == 2
    assert "attack-loop" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "column, value, text",
    [
        ("median_s", 0.0123, "12.3 ms"), ("cpu_s", 23.45, "23.4 s"), ("images_per_s", 12.345, "12.35"), ("peak_bytes", 2.5e6, "2.5 MB"),
        ("spread", 0.125, "12.5 %"), ("robust_accuracy_0.1", 0.5, "50.0 %"), ("ratio", float("nan"), "-"), ("name", "cpu", "cpu"),
    ],
)
def test_cells(column, value, text):
    assert format_cell(column, value) == text
