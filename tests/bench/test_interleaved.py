import pandas as pd
import pytest
import torch

from lrrobust.bench import interleaved
from lrrobust.bench.interleaved import summarise_times, time_interleaved


def test_ways_take_turns_and_the_first_round_is_not_counted(monkeypatch):
    called = []
    clock = iter(range(0, 1000))
    monkeypatch.setattr(interleaved.time, "perf_counter", lambda: next(clock))
    frame = time_interleaved({"a": lambda: called.append("a"), "b": lambda: called.append("b")}, repeats=2, device=torch.device("cpu"))
    assert called == ["a", "b"] * 3
    assert list(zip(frame.name, frame["repeat"], frame.wall_s, strict=True)) == [("a", 0, 1), ("b", 0, 1), ("a", 1, 1), ("b", 1, 1)]


def test_ratios_are_taken_within_rounds():
    # The machine is ten times slower in round 1: ratios within rounds do not notice.
    times = {"base": (1.0, 10.0, 1.0), "slow": (3.0, 30.0, 4.0)}
    frame = pd.DataFrame(
        [{"case": "x", "name": name, "repeat": r, "wall_s": w} for name, walls in times.items() for r, w in enumerate(walls)]
    )
    summary = summarise_times(frame, ["case"], "base").set_index("name")
    assert summary.ratio.to_dict() == {"base": 1.0, "slow": 3.0}
    assert summary.median_s.to_dict() == {"base": 1.0, "slow": 4.0}
    assert summary.spread["slow"] == pytest.approx((30 - 3) / 4)
