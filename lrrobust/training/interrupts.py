"""Ctrl-C, held back while something is half done."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def interrupts_held_back() -> Iterator[list[tuple[Any, ...]]]:
    """Delays Ctrl-C to the end of the block: half a step in a checkpoint would not be on the recipe's curve.

    Yields:
        what has been received so far. Where the block raises, it is dropped.
    """
    handler = signal.getsignal(signal.SIGINT)
    received: list[tuple[Any, ...]] = []
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield received
        return
    signal.signal(signal.SIGINT, lambda *arguments: received.append(arguments))
    try:
        yield received
    finally:
        signal.signal(signal.SIGINT, handler)
    if received:
        handler(*received[0])
