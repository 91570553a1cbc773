"""Which images of a data set are drawn, the same on every machine and with every library version."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from lrrobust.errors import DataError


def choose_indices(labels: Sequence[int], n: int | None, *, seed: int, balanced: bool) -> list[int]:
    """Draw `n` positions of `labels` at random, without repetition.

    With the same seed and labels a smaller draw is contained in every larger one. The order of the
    draw comes from SHA-256 rather than a generator of numpy, whose stream may change by version.

    Args:
        labels: label of each image.
        n: how many, at least 1; None means all.
        seed: any integer.
        balanced: draw equally many of each label, as far as there are enough: class counts differ
            by more than one only where a class is used up.

    Returns:
        Ascending positions.

    Raises:
        DataError: `n` is below 1 or above the number of labels.
    """
    if n is None:
        return list(range(len(labels)))
    if n < 1:
        raise DataError(f"number of images to draw: expected 1 or more, got {n}")
    if n > len(labels):
        raise DataError(f"{n} images asked for, and only {len(labels)} have a known class; ask for at most that")
    order = sorted(range(len(labels)), key=lambda position: _rank(seed, "image", position))
    if balanced:
        # One image of every class a round, the classes of each round in an order of its own.
        rounds: dict[int, int] = defaultdict(int)
        turns = []
        for position in order:
            label = labels[position]
            turns.append((rounds[label], _rank(seed, "class", rounds[label], label), position))
            rounds[label] += 1
        order = [position for _, _, position in sorted(turns)]
    return sorted(order[:n])


def read_indices(path: str | Path) -> list[int]:
    """Read positions from a text file, one a line; empty lines and what follows a # are skipped.

    Returns:
        The positions in the order of the file, zero or more each and none twice.

    Raises:
        DataError: the file cannot be read, holds no position, or has a line that is not a new
            non-negative integer.
    """
    try:
        # A device never ends, a pipe would have us wait.
        if Path(path).exists() and not Path(path).is_file():
            raise OSError("not a regular file")
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(
            f"index file {path}: expected text with one integer a line, found {reason[:1].lower()}{reason[1:]}"
        ) from error
    line_of: dict[int, int] = {}
    for number, line in enumerate(lines, start=1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        if not (text.isascii() and text.isdigit() and len(text) < 19):
            raise DataError(f"index file {path}, line {number}: expected an integer of 0 or more, found {text[:60]!r}")
        index = int(text)
        if index in line_of:
            raise DataError(f"index file {path}, line {number}: {index} stands already on line {line_of[index]}")
        line_of[index] = number
    if not line_of:
        raise DataError(f"index file {path}: expected one integer a line, found none")
    return list(line_of)


def _rank(seed: int, *what: object) -> bytes:
    return hashlib.sha256(":".join(map(str, (seed, *what))).encode()).digest()
