"""Figures as files, drawn by this process, and where they are many by another one as well."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any, NamedTuple

from lrrobust.interrupts import interrupts_kept_from_children
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


#: Gives drawings once they are wanted: in the order of their sketches, without those that turned out to show nothing.
Collect = Callable[[], Sequence[Drawing]]


@dataclass(eq=False)
class _Order:
    """A figure to be drawn by whoever comes first; `future` is None where nobody else can."""

    sketch: Sketch
    future: Future[Drawing] | None = None
    drawing: Drawing | None = None


class Drawers:
    """This process and, where there is much to draw, a second one that begins at once, while this one does other work.

    A context: whoever leaves it, however, leaves no process behind.
    """

    def __init__(self) -> None:
        self._pool: ProcessPoolExecutor | None = None
        self._is_alone = count_cores() < 2
        self._orders: list[_Order] = []

    def __enter__(self) -> Drawers:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def expect(self, figures: int) -> None:
        """About as many will be begun: where that is many, the other process starts and loads matplotlib meanwhile."""
        if not self._is_alone and figures >= _MANY:
            self._try_sharing([])

    def begin(self, sketches: Iterable[Sketch]) -> Collect:
        """Begins to draw, each figure as soon as it is sketched where the other process is there already.

        The function returned does the rest, the same whoever draws. To be called late, in the context.
        """
        orders: list[_Order] = []
        for sketch in sketches:
            orders.append(_Order(sketch))
            self._orders.append(orders[-1])
            if not self._is_alone and self._pool is not None:
                self._try_sharing(orders[-1:])
        waiting = [order for order in self._orders if order.future is None and order.drawing is None]
        if not self._is_alone and len(waiting) >= _MANY:
            self._try_sharing(waiting)
        return lambda: self._collect(orders)

    def _try_sharing(self, orders: Sequence[_Order]) -> None:
        try:
            self._share(orders)
        except (BrokenProcessPool, OSError) as error:
            _log.warning("no second process to draw figures with (%s): one draws them all", error)
            self._is_alone = True

    def _share(self, orders: Sequence[_Order]) -> None:
        with interrupts_kept_from_children():
            if self._pool is None:
                # Not forked: libraries that have threads do not survive that.
                context = multiprocessing.get_context("spawn")
                self._pool = ProcessPoolExecutor(1, mp_context=context, initializer=_serve)
                self._pool.submit(_load_matplotlib)
            for order in orders:
                order.future = self._pool.submit(_draw, order.sketch)

    def _collect(self, orders: Sequence[_Order]) -> list[Drawing]:
        # The other process goes from the first order to the last, this one back from the last, until they meet.
        for order in reversed(self._orders):
            if order.drawing is None and (order.future is None or order.future.cancel()):
                order.drawing = _draw(order.sketch)
        drawings = []
        for order in orders:
            if order.drawing is None:
                order.drawing = _fetch(order)
            if order.drawing.files:
                drawings.append(order.drawing)
        return drawings


def _draw(sketch: Sketch) -> Drawing:
    return Drawing(sketch.dataset_sha256, sketch.stem, sketch.description, sketch.render(*sketch.arguments))


def _fetch(order: _Order) -> Drawing:
    try:
        return order.future.result()
    except BrokenProcessPool:
        # Such as killed for want of memory: nothing is lost that cannot be drawn here.
        return _draw(order.sketch)


def _load_matplotlib() -> None:
    import lrrobust.plots  # noqa: F401


def _serve() -> None:
    """In the other process: whoever started it answers Ctrl-C, and does not leave it behind, however it ends itself."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
