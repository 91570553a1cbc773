"""Figures as files, drawn by this process, and where they are many by another one as well."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, NamedTuple

_log = logging.getLogger(__name__)

#: Figures from which on a second process saves more time than it takes to start.
_MANY = 8


class Drawing(NamedTuple):
    """A figure of one set of images: what it shows in words, and kind ("png", "svg", "pdf") -> content."""

    dataset_sha256: str
    stem: str
    description: str
    files: Mapping[str, bytes]


class Sketch(NamedTuple):
    """A figure that is not drawn yet: `render(*arguments)` gives its files; both can be pickled."""

    dataset_sha256: str
    stem: str
    description: str
    render: Callable[..., Mapping[str, bytes]]
    arguments: tuple[Any, ...]


def draw(sketches: Sequence[Sketch]) -> list[Drawing]:
    """The drawings of all sketches, in their order; the same whoever draws them."""
    if len(sketches) < _MANY or _cores() < 2:
        return [_draw(sketch) for sketch in sketches]
    # Not forked: libraries that have threads do not survive that.
    pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), initializer=_serve)
    try:
        # The other process begins at the end, this one at the start, until they meet.
        with _interrupts_blocked():
            futures = [pool.submit(_draw, sketch) for sketch in reversed(sketches)][::-1]
        return [_draw(sketch) if future.cancel() else _fetch(future, sketch) for sketch, future in zip(sketches, futures)]
    except (BrokenProcessPool, OSError) as error:
        _log.warning("no second process to draw figures with (%s): one draws them all", error)
        return [_draw(sketch) for sketch in sketches]
    finally:
        pool.shutdown(cancel_futures=True)


def _draw(sketch: Sketch) -> Drawing:
    return Drawing(sketch.dataset_sha256, sketch.stem, sketch.description, sketch.render(*sketch.arguments))


def _fetch(future: Future[Drawing], sketch: Sketch) -> Drawing:
    try:
        return future.result()
    except BrokenProcessPool:
        # Such as killed for want of memory: nothing is lost that cannot be drawn here.
        return _draw(sketch)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Ctrl-C waits until the end of the block; processes started in it never hear of one, from their first line on."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve() -> None:
    """In the other process: whoever started it answers Ctrl-C, and does not leave it behind, however it ends itself."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
