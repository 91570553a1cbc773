"""Figures as files, drawn by this process, and where they are many by another one as well."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, NamedTuple

from lrrobust.process_settings import count_cores

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


class Drawers:
    """This process and, where there is much to draw, a second one that begins at once, while this one does other work.

    A context: whoever leaves it, however, leaves no process behind.
    """

    def __init__(self) -> None:
        self._pool: ProcessPoolExecutor | None = None
        self._is_alone = count_cores() < 2

    def __enter__(self) -> Drawers:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def begin(self, sketches: Sequence[Sketch]) -> Callable[[], list[Drawing]]:
        """Begins to draw; the function returned does the rest and gives the drawings, the same whoever drew them.

        In the order of the sketches, without those that turned out to show nothing.
        """
        if len(sketches) < _MANY and self._pool is None or self._is_alone:
            return lambda: _with_files(map(_draw, sketches))
        try:
            with _interrupts_blocked():
                if self._pool is None:
                    # Not forked: libraries that have threads do not survive that.
                    context = multiprocessing.get_context("spawn")
                    self._pool = ProcessPoolExecutor(1, mp_context=context, initializer=_serve)
                # The other process begins at the end, this one at the start, until they meet.
                futures = [self._pool.submit(_draw, sketch) for sketch in reversed(sketches)][::-1]
        except (BrokenProcessPool, OSError) as error:
            _log.warning("no second process to draw figures with (%s): one draws them all", error)
            self._is_alone = True
            return lambda: _with_files(map(_draw, sketches))
        return lambda: _with_files(
            _draw(sketch) if future.cancel() else _fetch(future, sketch) for sketch, future in zip(sketches, futures)
        )


def draw(sketches: Sequence[Sketch]) -> list[Drawing]:
    """What `Drawers.begin` gives, for who has nothing else to do meanwhile."""
    with Drawers() as drawers:
        return drawers.begin(sketches)()


def _with_files(drawings: Iterable[Drawing]) -> list[Drawing]:
    return [drawing for drawing in drawings if drawing.files]


def _draw(sketch: Sketch) -> Drawing:
    return Drawing(sketch.dataset_sha256, sketch.stem, sketch.description, sketch.render(*sketch.arguments))


def _fetch(future: Future[Drawing], sketch: Sketch) -> Drawing:
    try:
        return future.result()
    except BrokenProcessPool:
        # Such as killed for want of memory: nothing is lost that cannot be drawn here.
        return _draw(sketch)


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
