"""Decoding images on all cores: Pillow releases the interpreter lock while it decodes."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")

#: Told how many are done, of how many.
OnProgress = Callable[[int, int], None]

_BLOCK = 64
_MAX_THREADS = 8


def map_in_order(function: Callable[[int], T], count: int, on_progress: OnProgress | None = None) -> list[T]:
    """`[function(i) for i in range(count)]` on several threads.

    The first error in order is raised, whichever thread fails first, and ends the work.

    Args:
        function: safe to call from several threads.
        count: zero or more.
        on_progress: called now and then from the calling thread with how many are done, and `count`.
    """
    results: list[T] = []
    pool = ThreadPoolExecutor(max_workers=min(_MAX_THREADS, os.cpu_count() or 1))
    try:
        starts = range(0, count, _BLOCK)
        blocks = [
            pool.submit(lambda start: [function(i) for i in range(start, min(start + _BLOCK, count))], start)
            for start in starts
        ]
        for block in blocks:
            results += block.result()
            if on_progress is not None:
                on_progress(len(results), count)
    finally:
        pool.shutdown(cancel_futures=True)
    return results
