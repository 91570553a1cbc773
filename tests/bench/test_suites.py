import pandas as pd
import pytest
import torch

from lrrobust import cli
from lrrobust.bench import suites
from lrrobust.bench.local_relation import Stage, compare_operations
from lrrobust.bench.suites import BenchRequest, format_cell


def test_command_writes_times_with_the_hardware(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        suites, "compare_operations", lambda **options: compare_operations((Stage("tiny", 8, 6),), batch_size=1, with_memory=False, **options)
    )
    assert cli.run(["bench", "operation", "--repeats", "3", "--out", str(tmp_path)]) == 0
    assert "operation: medians of 3 interleaved rounds" in capsys.readouterr().out
    times = pd.read_csv(tmp_path / "operation-times.csv")
    assert (times.groupby("name").size() == 3).all() and times.processor.notna().all() and times.threads.notna().all()
    summary = pd.read_csv(tmp_path / "operation-summary.csv").set_index("name")
    assert summary.ratio["cpu"] == 1
    assert summary.median_s["cpu"] == times[times.name == "cpu"].wall_s.median()
    page = (tmp_path / "operation.md").read_text()
    assert summary.date.iloc[0] in page and summary.processor.iloc[0] in page and "the range of the times" in page
    assert f"| tiny | unfold | {1e3 * summary.median_s['unfold']:.1f} ms | " in page and f" | {summary.ratio['unfold']:.2f} |" in page


def test_peaks_are_set_beside_what_they_are_measured_by(monkeypatch):
    request = BenchRequest(2, 1, (), "pgd", "photos", torch.device("cpu"))
    common = {"repeat": 0, "wall_s": 1.0}
    steps = [{"size": 64, "name": name, "peak_bytes": peak, **common} for name, peak in (("resnet50", 4.0), ("lr_resnet50", 5.0))]
    monkeypatch.setattr(suites, "compare_gradient_steps", lambda **options: pd.DataFrame(steps))
    assert list(suites.bench_gradient_step(request).summary.peak_ratio) == [1, 1.25]
    calls = [{"stage": "tiny", "name": "cpu", "peak_bytes": 3.0, "io_bytes": 2, **common}]
    monkeypatch.setattr(suites, "compare_operations", lambda **options: pd.DataFrame(calls))
    assert list(suites.bench_operation(request).summary.peak_ratio) == [1.5]


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
