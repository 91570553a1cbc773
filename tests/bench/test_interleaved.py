import math

import pandas as pd
import pytest
import torch

from lrrobust.bench import interleaved
from lrrobust.bench.interleaved import collect, summarise_times, time_interleaved

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch):
    """A clock that ways move on by what they are said to take; CPU time runs at twice its pace."""
    now = [0.0]
    monkeypatch.setattr(interleaved.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(interleaved.time, "process_time", lambda: 2 * now[0])

    def taking(seconds):
        def way():
            now[0] += seconds

        return way

    return taking


def test_ways_take_turns_and_the_first_round_is_not_counted(clock):
    turns = []
    frame = pd.DataFrame(
        time_interleaved({"a": clock(1), "b": clock(2)}, repeats=2, device=CPU, baseline="a", on_turn=turns.append, case="x")
    )
    assert turns == ["x: a, warming up", "x: b, warming up", *(f"x: {name}, round {r} of 2" for r in (1, 2) for name in "ab")]
    rows = [(row.name_, row.repeat, row.wall_s, row.cpu_s) for row in frame.rename(columns={"name": "name_"}).itertuples()]
    assert rows == [("a", 0, 1, 2), ("b", 0, 2, 4), ("a", 1, 1, 2), ("b", 1, 2, 4)]


def test_warm_ups_and_what_was_read(clock):
    called = []
    rows = time_interleaved(
        {"a": lambda: 7},
        warm_ups={"a": lambda: called.append("short")},
        read=lambda found: {"found": found},
        repeats=1,
        device=CPU,
        baseline="a",
    )
    # Nothing is done before it is asked for.
    assert called == []
    (row,) = rows
    assert called == ["short"] and row["found"] == 7


def run_out(_=None):
    raise torch.OutOfMemoryError("tried to allocate 140 GiB")


def test_who_runs_out_of_memory_is_left_out_and_the_others_go_on(clock, caplog):
    rounds = iter([clock(1), clock(1), run_out])  # to warm up, the first round, the second
    ways = {"base": clock(1), "greedy": run_out, "late": lambda: next(rounds)(), "fast": clock(1)}
    frame = pd.DataFrame(time_interleaved(ways, repeats=3, device=CPU, baseline="base", case="64 pixels"))
    assert frame.groupby("name").size().to_dict() == {"base": 3, "fast": 3, "late": 1}
    told = "64 pixels: {} is left out: it runs out of memory on cpu; a smaller --batch-size needs less"
    assert caplog.messages == [told.format("greedy"), told.format("late")]


def test_without_the_baseline_there_is_nothing_to_compare(clock, caplog):
    rows = list(time_interleaved({"base": run_out, "other": clock(1)}, repeats=2, device=CPU, baseline="base"))
    assert rows == [] and "base is left out, and with it what is compared with it" in caplog.text


def test_rows_measured_before_memory_ran_out_are_kept(caplog):
    def rows(count, error):
        yield from ({"name": "a", "repeat": repeat} for repeat in range(count))
        raise error

    frame, interruption = collect(rows(2, torch.OutOfMemoryError("tried to allocate 140 GiB")))
    assert len(frame) == 2 and interruption is None
    assert caplog.messages == [
        "memory ran out, which ends this benchmark (tried to allocate 140 GiB); what was measured until then is kept"
    ]
    for count, error in ((0, torch.OutOfMemoryError()), (2, ValueError())):
        with pytest.raises(type(error)):
            collect(rows(count, error))


def test_other_failures_are_not_taken_for_memory(clock):
    def broken():
        raise ValueError("shapes")

    with pytest.raises(ValueError, match="shapes"):
        list(time_interleaved({"base": clock(1), "other": broken}, repeats=2, device=CPU, baseline="base"))


@pytest.mark.parametrize(
    "budget_s, counts",
    [
        (math.inf, {"base": 9, "fast": 9, "slow": 9, "slower": 9}),
        # 9 rounds of what is fast take 27 s; of the 73 s left slow has half, and slower what that leaves over.
        (100, {"base": 9, "fast": 9, "slow": 3, "slower": 2}),
        (160, {"base": 9, "fast": 9, "slow": 6, "slower": 3}),
        (0, {"base": 2, "fast": 2, "slow": 2, "slower": 2}),
    ],
)
def test_slow_ways_sit_rounds_out_but_are_never_timed_once(clock, budget_s, counts):
    seconds = {"slow": 11, "fast": 1, "slower": 20, "base": 2}
    ways = {name: clock(each) for name, each in seconds.items()}
    frame = pd.DataFrame(time_interleaved(ways, repeats=9, device=CPU, baseline="base", budget_s=budget_s))
    rounds = frame.groupby("name")["repeat"].agg(list)
    assert {name: len(found) for name, found in rounds.items()} == counts
    last = max(counts.values()) - 1
    for found in rounds:
        # The first and the last round, and evenly between.
        gaps = [after - before for before, after in zip(found, found[1:])]
        assert (found[0], found[-1]) == (0, last) and max(gaps) - min(gaps) <= 1
        assert set(found) <= set(rounds["base"])


def test_rounds_end_with_the_budget_when_the_machine_slows_down(clock):
    seconds = iter([1, 1, *[10] * 99])
    base = lambda: clock(next(seconds))()  # noqa: E731
    frame = pd.DataFrame(
        time_interleaved({"base": base, "slow": clock(20)}, repeats=9, device=CPU, baseline="base", budget_s=60)
    )
    # Four rounds of 10 s were not foreseen; the last is for what was timed only once.
    assert frame.groupby("name")["repeat"].agg(list).to_dict() == {"base": [0, 1, 2, 3, 4, 5], "slow": [0, 5]}


def test_the_baseline_is_part_of_every_round(clock):
    ways = {"base": clock(10), "fast": clock(1)}
    frame = pd.DataFrame(time_interleaved(ways, repeats=9, device=CPU, baseline="base", budget_s=40))
    # By itself it would be part of three, and what is fast of nine.
    assert frame.groupby("name").size().to_dict() == {"base": 4, "fast": 4}


def test_an_interruption_loses_nothing_measured(clock):
    calls = iter(range(9))

    def interrupted():
        # Warm-up, round 1, and then Ctrl-C.
        if next(calls) == 2:
            raise KeyboardInterrupt

    frame, interruption = collect(time_interleaved({"a": clock(1), "b": interrupted}, repeats=3, device=CPU, baseline="a"))
    assert isinstance(interruption, KeyboardInterrupt)
    assert list(zip(frame["name"], frame["repeat"], strict=True)) == [("a", 0), ("b", 0), ("a", 1)]
    whole, nothing = collect(time_interleaved({"a": clock(1)}, repeats=3, device=CPU, baseline="a"))
    assert len(whole) == 3 and nothing is None


def test_ratios_are_taken_within_rounds():
    # The machine is ten times slower in round 1: ratios within rounds do not notice. What sat rounds out is compared
    # where it was.
    times = {"base": (1.0, 10.0, 1.0), "slow": (3.0, 30.0, 4.0), "rare": (6.0, 70.0), "once": (2.0,)}
    frame = pd.DataFrame(
        [
            {"case": "x", "name": name, "repeat": r, "wall_s": w, "cpu_s": w if name == "base" else 2 * w}
            for name, walls in times.items()
            for r, w in enumerate(walls)
        ]
    )
    summary = summarise_times(frame, ["case"], "base").set_index("name")
    assert summary.ratio.to_dict() == {"base": 1.0, "slow": 3.0, "rare": 6.5, "once": 2.0}
    assert summary.cpu_ratio.to_dict() == {"base": 1.0, "slow": 6.0, "rare": 13.0, "once": 4.0}
    assert summary.repeats.to_dict() == {"base": 3, "slow": 3, "rare": 2, "once": 1}
    assert summary.median_s.to_dict() == {"base": 1.0, "slow": 4.0, "rare": 38.0, "once": 2.0}
    assert summary.spread["slow"] == pytest.approx((30 - 3) / 4) and math.isnan(summary.spread["once"])
    assert "cpu_ratio" not in summarise_times(frame.drop(columns="cpu_s"), ["case"], "base")
