import signal
from operator import attrgetter
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from lrrobust import cli
from lrrobust.bench import suites
from lrrobust.bench.local_relation import Stage, compare_operations
from lrrobust.bench.suites import BENCHES, BenchRequest, format_cell
from lrrobust.console import progress
from lrrobust.interrupts import Stopped
from lrrobust.models import Classifier


def test_command_writes_times_with_the_hardware(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        suites,
        "compare_operations",
        lambda **options: compare_operations((Stage("tiny", 8, 6),), batch_size=1, with_memory=False, **options),
    )
    assert cli.run(["bench", "operation", "--repeats", "3", "--out", str(tmp_path)]) == 0
    assert "operation: medians of interleaved rounds" in capsys.readouterr().out
    times = pd.read_csv(tmp_path / "operation-times.csv")
    assert (times.groupby("name").size() == 3).all() and times.processor.notna().all() and times.threads.notna().all()
    summary = pd.read_csv(tmp_path / "operation-summary.csv").set_index("name")
    assert summary.ratio["cpu"] == 1 and set(summary.repeats) == {3}
    assert summary.median_s["cpu"] == times[times.name == "cpu"].wall_s.median()
    page = (tmp_path / "operation.md").read_text()
    assert summary.date.iloc[0] in page and summary.processor.iloc[0] in page and "the range of the times" in page
    assert (
        f"| tiny | unfold | 3 | {1e3 * summary.median_s['unfold']:.1f} ms | " in page
        and f" | {summary.ratio['unfold']:.2f} |" in page
    )


def test_peaks_are_set_beside_what_they_are_measured_by(monkeypatch):
    request = BenchRequest(2, torch.device("cpu"))
    common = {"repeat": 0, "wall_s": 1.0}
    steps = [
        {"size": 64, "batch_size": 1, "case": case, "name": name, "peak_bytes": peak, **common}
        for case, network, of_network in (("fused", "lr_resnet50", 5.0), ("reference", "lr_resnet50, reference", 8.0))
        for name, peak in (("resnet50", 4.0), (network, of_network))
    ]
    monkeypatch.setattr(suites, "compare_gradient_steps", lambda *_, **options: steps)
    assert list(suites.bench_gradient_step(request).summary.peak_ratio) == [1, 1.25, 1, 2]
    calls = [{"stage": "tiny", "name": "cpu", "peak_bytes": 3.0, "io_bytes": 2, **common}]
    monkeypatch.setattr(suites, "compare_operations", lambda **options: calls)
    assert list(suites.bench_operation(request).summary.peak_ratio) == [1.5]


def test_nothing_measured_is_one_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(suites, "compare_operations", lambda **options: iter(()))
    assert cli.run(["bench", "operation", "--out", str(tmp_path)]) == 2
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith("error: nothing was measured: all that the others are compared with ran out of memory")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("tried to allocate 140 GiB"), MemoryError()])
def test_memory_that_runs_out_outside_of_what_is_timed_is_one_line(error, monkeypatch, tmp_path, capsys):
    def run_out(**options):
        raise error

    monkeypatch.setattr(suites, "compare_operations", run_out)
    assert cli.run(["bench", "operation", "--out", str(tmp_path)]) == 2
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith(f"error: memory ran out ({str(error) or 'MemoryError'}); what was finished is kept; give a smaller")


class _Interrupted:
    """A comparison that Ctrl-C ends when it has yielded some rows."""

    def __init__(self, count, cause):
        self.count, self.cause = count, cause

    def __call__(self, *, on_turn, **options):
        for repeat in range(self.count):
            on_turn(f"cpu, round {repeat + 1}")
            yield {"stage": "tiny", "name": "cpu", "repeat": repeat, "wall_s": 1.0, "cpu_s": 1.0, "io_bytes": 2}
        raise self.cause


@pytest.mark.parametrize("signum, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_benchmark_shows_what_it_has(tmp_path, monkeypatch, capsys, signum, code):
    (tmp_path / "operation.md").write_text("finished before")
    monkeypatch.setattr(suites, "compare_operations", _Interrupted(1, Stopped(signum)))
    monkeypatch.setattr(suites, "compare_gradient_steps", None)
    # Nothing else is begun.
    assert cli.run(["bench", "operation", "gradient-step", "--out", str(tmp_path)]) == code
    said = capsys.readouterr()
    assert "operation: medians of interleaved rounds, interrupted" in said.out and "1000.0 ms" in said.out
    assert said.err.splitlines()[-1].endswith(": operation was not finished")
    assert (tmp_path / "operation.md").read_text() == "finished before"
    assert "| tiny | cpu | 1 | 1000.0 ms | - |" in (tmp_path / "operation-interrupted.md").read_text()
    assert len(pd.read_csv(tmp_path / "operation-interrupted-times.csv")) == 1


def test_an_interruption_before_the_first_time(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(suites, "compare_operations", _Interrupted(0, KeyboardInterrupt()))
    assert cli.run(["bench", "operation", "--out", str(tmp_path)]) == 130
    said = capsys.readouterr()
    assert said.out == "" and said.err.splitlines()[-1] == "interrupted: operation was not finished"
    assert not list(tmp_path.iterdir())

    def store(request):
        raise KeyboardInterrupt

    monkeypatch.setitem(BENCHES, "store", store)
    assert cli.run(["bench", "store", "--out", str(tmp_path)]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted: nothing of store was measured yet"


def test_progress_is_a_line_now_and_then_without_a_terminal(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(suites, "compare_operations", _Interrupted(3, KeyboardInterrupt()))
    cli.run(["bench", "operation", "--out", str(tmp_path)])
    assert [line for line in capsys.readouterr().err.splitlines() if "round" in line] == ["operation: cpu, round 1"]
    monkeypatch.setattr(progress, "_LINE_INTERVAL_S", 0)
    cli.run(["bench", "operation", "--out", str(tmp_path)])
    assert len([line for line in capsys.readouterr().err.splitlines() if "round" in line]) == 3


def test_options_reach_the_measurement(tmp_path, monkeypatch):
    given = []

    def measure(request):
        given.append(request)
        return suites.BenchResult(None, pd.DataFrame())

    monkeypatch.setitem(BENCHES, "harness", measure)
    assert cli.run(["bench", "harness"]) == 0
    numbers = attrgetter("repeats", "budget_s", "n", "models", "sizes", "batch_size")
    assert numbers(given[0]) == (5, 120, 32, ("resnet50",), None, None)
    options = "--repeats 3 --budget 7.5 --n 9 -m a -m b --image-size 64 --image-size 224 --batch-size 5"
    options += " --attack fgsm --dataset folder"
    assert cli.run(["bench", "harness", *options.split()]) == 0
    assert numbers(given[1]) == (3, 7.5, 9, ("a", "b"), (64, 224), 5)
    assert (given[1].attack, given[1].dataset) == ("fgsm", "folder")


@pytest.mark.parametrize("bench", ["attack-loop", "harness"])
def test_attacks_on_every_model_and_size(monkeypatch, bench):
    def load(name, *, imagenet_classes, input_size):
        network = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten(), torch.nn.Linear(12, 3))
        return Classifier(network, ("a", "b", "c"), input_size or 6)

    def build(dataset, classes, preprocessing, n):
        pixels = torch.rand(n, 3, preprocessing.input_size, preprocessing.input_size)
        images = SimpleNamespace(load=lambda positions: (pixels, torch.zeros(n, dtype=torch.int64)))
        return type("Images", (SimpleNamespace,), {"__len__": lambda self: n})(**vars(images))

    monkeypatch.setattr(suites, "load_classifier", load)
    monkeypatch.setattr(suites, "open_dataset", lambda name, classes: name)
    monkeypatch.setattr(suites, "build_evaluation_set", build)
    request = BenchRequest(1, torch.device("cpu"), n=4, models=("first", "second"))
    result = BENCHES[bench](request)
    assert result.interruption is None and result.times.groupby(["model", "size"]).ngroups == 2
    assert set(result.summary["size"]) == {6} and set(result.summary.repeats) == {1}
    assert result.summary.groupby("model").ratio.min().le(1).all() and result.summary.ratio.notna().all()
    two = BENCHES[bench](BenchRequest(1, torch.device("cpu"), n=2, models=("first",), sizes=(4, 8), batch_size=2))
    assert set(two.summary["size"]) == {4, 8}


@pytest.mark.parametrize("attack", ["cw", "standard"])
def test_attacks_that_no_peer_has_are_one_line(tmp_path, capsys, attack):
    assert cli.run(["bench", "harness", "--attack", attack, "--out", str(tmp_path)]) == 2
    assert f"error: --attack: expected one attack of kind pgd, got '{attack}': " in capsys.readouterr().err


def test_attack_loop_needs_no_more_than_names(tmp_path, monkeypatch, capsys):
    assert cli.run(["bench", "atack-loop", "--out", str(tmp_path)]) == 2
    assert "attack-loop" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "column, value, text",
    [
        ("median_s", 0.0123, "12.3 ms"),
        ("cpu_s", 23.45, "23.4 s"),
        ("images_per_s", 12.345, "12.35"),
        ("peak_bytes", 2.5e6, "2.5 MB"),
        ("io_bytes", 2500000, "2.5 MB"),
        ("gradients", 12, "12"),
        ("spread", 0.125, "12.5 %"),
        ("robust_accuracy_0.1", 0.5, "50.0 %"),
        ("ratio", float("nan"), "-"),
        ("name", "cpu", "cpu"),
    ],
)
def test_cells(column, value, text):
    assert format_cell(column, value) == text


def test_help_says_what_each_benchmark_is(capsys):
    assert cli.run(["bench", "--help"]) == 0
    help_text = capsys.readouterr().out
    assert [name for name in BENCHES if f"{name}: " not in help_text] == []
