"""Times of several ways to do one thing, taken in turns, so that what else the machine does hits all alike."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import pandas as pd
import torch

from lrrobust.out_of_memory import explain_in_brief, is_out_of_memory

_log = logging.getLogger(__name__)

#: Rounds in which everything is timed, whatever it costs: what is timed once says nothing of its noise.
LEAST_ROUNDS = 2

#: Told what is about to be done, before it is.
OnTurn = Callable[[str], None]


def say_nothing(_: str) -> None:
    """Default callback: does nothing."""


def time_interleaved(
    ways: Mapping[str, Callable[[], object]],
    *,
    repeats: int,
    device: torch.device,
    baseline: str,
    budget_s: float = math.inf,
    warm_ups: Mapping[str, Callable[[], object]] | None = None,
    read: Callable[[Any], Mapping[str, object]] = lambda _: {},
    case: str = "",
    on_turn: OnTurn = say_nothing,
) -> Iterator[dict[str, object]]:
    """Calls every way in each of `repeats` rounds; rows as they are measured, so that an interruption loses none.

    Where the rounds would take longer than the budget, slow ways sit some of them out, spread evenly over them all. The
    first round tells what each takes; whoever takes less than an equal share of what is left leaves the rest to slower
    ones. Where everything takes longer than it did then, the rounds end when the budget is spent. Nothing is timed less
    than `LEAST_ROUNDS` times, whatever the budget.

    What runs out of memory is reported and sits out all further rounds; without the baseline there are no further rows.

    Args:
        baseline: the way that the others are compared with: it is part of every round.
        budget_s: for all counted rounds.
        warm_ups: called once before the first round, not counted; by default the ways themselves.
        read: what to note of what a way returns.
        case: what is timed, for `on_turn`.

    Yields:
        `name`, `repeat`, `wall_s`, `cpu_s` (of all threads of this process), and what was read.
    """
    told = f"{case}: " if case else ""
    ways = dict(ways)

    def fits(name: str, work: Callable[[], object], found: list[object]) -> bool:
        try:
            found.append(work())
            return True
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        # Not while the error lives, whose frames hold what filled the memory.
        del ways[name]
        if device.type == "cuda":
            torch.cuda.empty_cache()
        others = ", and with it what is compared with it" if name == baseline else ""
        _log.warning(
            "%s%s is left out%s: it runs out of memory on %s; a smaller --batch-size needs less", told, name, others, device
        )
        return False

    for name, warm_up in list((ways if warm_ups is None else warm_ups).items()):
        on_turn(f"{told}{name}, warming up")
        if not fits(name, warm_up, []) and name == baseline:
            return
    counts = dict.fromkeys(ways, repeats)
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(repeats):
        rounds = max(counts.values())
        if is_last := repeat > 0 and sum(map(sum, taken.values())) >= budget_s:
            rounds = min(rounds, repeat + 1)
            rare = {name for name, times in taken.items() if len(times) < LEAST_ROUNDS}
            taking_part = rare and {*rare, baseline}
        else:
            taking_part = {name for name, count in counts.items() if _takes_part(repeat, count, rounds)}
        for name in [name for name in ways if name in taking_part]:
            on_turn(f"{told}{name}, round {repeat + 1} of {rounds}")
            wait_for(device)
            started, started_cpu = time.perf_counter(), time.process_time()
            found: list[object] = []
            if not fits(name, ways[name], found):
                if name == baseline:
                    return
                counts.pop(name), taken.pop(name)
                continue
            wait_for(device)
            wall_s, cpu_s = time.perf_counter() - started, time.process_time() - started_cpu
            taken[name].append(wall_s)
            yield {"name": name, "repeat": repeat, "wall_s": wall_s, "cpu_s": cpu_s, **read(found.pop())}
        if is_last:
            return
        if repeat == 0:
            counts = _share_out({name: times[0] for name, times in taken.items()}, repeats, budget_s)
            counts[baseline] = max(counts.values())


def _share_out(first_s: Mapping[str, float], repeats: int, budget_s: float) -> dict[str, int]:
    """How often each way can be called, by the time of its first call."""
    counts = {}
    for place, name in enumerate(sorted(first_s, key=first_s.__getitem__)):
        share_s = budget_s / (len(first_s) - place)
        counts[name] = int(min(repeats, max(LEAST_ROUNDS, share_s / max(first_s[name], 1e-9))))
        budget_s = max(budget_s - counts[name] * first_s[name], 0.0)
    return counts


def _takes_part(repeat: int, count: int, rounds: int) -> bool:
    """Is this one of `count` rounds spread evenly over all, the first and the last among them?"""
    if repeat == 0 or count == rounds:
        return repeat < rounds
    return repeat * (count - 1) // (rounds - 1) > (repeat - 1) * (count - 1) // (rounds - 1)


def collect(rows: Iterable[dict[str, object]]) -> tuple[pd.DataFrame, KeyboardInterrupt | None]:
    """All rows, or those measured before an interruption, and the interruption; those until memory ran out likewise."""
    collected: list[dict[str, object]] = []
    try:
        for row in rows:
            collected.append(row)
    except KeyboardInterrupt as interruption:
        return pd.DataFrame(collected), interruption
    except Exception as error:
        if not (collected and is_out_of_memory(error)):
            raise
        _log.warning(
            "memory ran out, which ends this benchmark (%s); what was measured until then is kept", explain_in_brief(error)
        )
    return pd.DataFrame(collected), None


def wait_for(device: torch.device) -> None:
    """Returns when the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def summarise_times(frame: pd.DataFrame, by: list[str], baseline: str, also: Sequence[str] = ()) -> pd.DataFrame:
    """Medians over the rounds, and what they are worth.

    Args:
        frame: rows of `time_interleaved`, perhaps of several cases.
        by: columns that tell the cases.
        baseline: the way that the others are compared with, in every case.
        also: columns whose medians are added.

    Returns:
        One row for each case and way: `repeats`, how often it was timed; `median_s`; `spread`, the range of its times by
        their median, NaN where there is one time only; `ratio`, its time by that of `baseline` in the same round, the
        median of these ratios; `cpu_ratio`, where CPU times were taken, the same of these, which other work on the machine
        changes less.
    """
    keys = [*by, "repeat"]
    ratios = {clock: ratio for clock, ratio in (("wall_s", "ratio"), ("cpu_s", "cpu_ratio")) if clock in frame}
    base = frame[frame["name"] == baseline].set_index(keys)[list(ratios)].add_prefix("base_")
    frame = frame.join(base, on=keys)
    for clock, ratio in ratios.items():
        frame[ratio] = frame[clock] / frame[f"base_{clock}"]
    grouped = frame.groupby([*by, "name"], sort=False)
    summary = grouped["wall_s"].agg(repeats="size", median_s="median", spread=_spread)
    return summary.join(grouped[[*ratios.values(), *also]].median()).reset_index()


def _spread(times: pd.Series) -> float:
    return (times.max() - times.min()) / times.median() if len(times) > 1 else math.nan
