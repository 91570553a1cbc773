"""Ctrl-C, and the signals that schedulers, service managers and closed terminals send: one way to stop, in good order."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

#: Those that by default end a process where it stands; not every system has all.
_ENDING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))
_ALL = (signal.SIGINT, *_ENDING)


class Stopped(KeyboardInterrupt):
    """A signal that asks the process to end.

    Args:
        signum: which.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


def raise_on_signals() -> None:
    """From now on these signals raise `Stopped`, as Ctrl-C does, but for those that somebody has set to something else.

    SLURM and Kubernetes end a process with SIGTERM, long before they kill it: time to give back what it holds.
    """
    process = os.getpid()

    def stop(signum: int, _: Any) -> None:
        if os.getpid() != process and signum != signal.SIGINT:
            # Whoever forked this process ends it, and waits for no exception.
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
            return
        raise Stopped(signum)

    for signum, default in ((signal.SIGINT, signal.default_int_handler), *((signum, signal.SIG_DFL) for signum in _ENDING)):
        if signal.getsignal(signum) is default:
            signal.signal(signum, stop)


@contextmanager
def interrupts_held_back() -> Iterator[list[tuple[Any, ...]]]:
    """Delays these signals to the end of the block: half a step in a checkpoint would not be on the recipe's curve.

    Yields:
        what has been received so far. Where the block raises, it is dropped.
    """
    received: list[tuple[Any, ...]] = []
    handlers = {signum: handler for signum in _ALL if callable(handler := signal.getsignal(signum))}
    if threading.current_thread() is not threading.main_thread():
        handlers = {}
    try:
        for signum in handlers:
            signal.signal(signum, lambda *arguments: received.append(arguments))
        yield received
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
    if received:
        handlers[received[0][0]](*received[0])


@contextmanager
def interrupts_kept_from_children() -> Iterator[None]:
    """Ctrl-C waits until the end of the block; processes started in it never hear of one, from their first line on."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
