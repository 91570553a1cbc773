"""Times of several ways to do one thing, taken in turns, so that what else the machine does hits all alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import pandas as pd
import torch


def time_interleaved(ways: Mapping[str, Callable[[], object]], *, repeats: int, device: torch.device) -> pd.DataFrame:
    """Calls every way once in each of `repeats` rounds, after one call of each that is not counted.

    Returns:
        One row for each round and way: `name`, `repeat`, `wall_s`.
    """
    rows = []
    for repeat in range(-1, repeats):
        for name, way in ways.items():
            wait_for(device)
            started = time.perf_counter()
            way()
            wait_for(device)
            rows.append({"name": name, "repeat": repeat, "wall_s": time.perf_counter() - started})
    frame = pd.DataFrame(rows)
    return frame[frame["repeat"] >= 0].reset_index(drop=True)


def wait_for(device: torch.device) -> None:
    """Returns when the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def summarise_times(frame: pd.DataFrame, by: list[str], baseline: str) -> pd.DataFrame:
    """Medians over the rounds, and what they are worth.

    Args:
        frame: rows of `time_interleaved`, perhaps of several cases.
        by: columns that tell the cases.
        baseline: the way that the others are compared with, in every case.

    Returns:
        One row for each case and way: `median_s`; `spread`, the range of its times by their median; `ratio`, its
        time by that of `baseline` in the same round, the median of these ratios.
    """
    keys = [*by, "repeat"]
    base = frame[frame["name"] == baseline].set_index(keys)["wall_s"].rename("base_s")
    frame = frame.join(base, on=keys)
    frame["ratio"] = frame["wall_s"] / frame["base_s"]
    grouped = frame.groupby([*by, "name"], sort=False)
    summary = grouped["wall_s"].agg(median_s="median", spread=lambda s: (s.max() - s.min()) / s.median())
    return summary.join(grouped["ratio"].median()).reset_index()
