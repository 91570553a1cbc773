"""The most memory that a computation holds at once, above what it started with."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

from lrrobust.bench.resident_memory import forget_freed_memory, keep_no_freed_memory, resident_bytes
from lrrobust.interrupts import interrupts_kept_from_children

#: Called in a process of its own with the arguments given; returns a small run that loads everything there is
#: to load, and the run that is measured.
Preparation = Callable[..., "tuple[Callable[[], object], Callable[[], object]]"]


def measure_peak_bytes(prepare: Preparation, *arguments: Any) -> float:
    """Peak resident memory of the measured run on the CPU, less what was resident before it, in bytes.

    In a fresh process, since memory that an earlier computation has freed but kept would hide the need for
    it, and one that keeps no large block that it frees: what glibc's heap holds beside it by default depends on the order of
    sizes, and is no need of the computation. NaN where the system does not tell (it is read from /proc, so only Linux does).

    Args:
        prepare: a function at the top level of a module; its arguments must be picklable.

    Raises:
        RuntimeError: the computation failed there, for instance for want of memory.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(sender, torch.get_num_threads(), prepare, arguments))
    with interrupts_kept_from_children():
        process.start()
    sender.close()
    try:
        result = receiver.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"{prepare.__name__}{arguments} ended with exit code {process.exitcode}") from None
    except BaseException:
        # Ctrl-C: nobody waits for the result any more.
        process.kill()
        process.join()
        raise
    process.join()
    return result


def _measure(sender: Connection, threads: int, prepare: Preparation, arguments: tuple[Any, ...]) -> None:
    keep_no_freed_memory()
    torch.set_num_threads(threads)
    warm_up, run = prepare(*arguments)
    warm_up()
    forget_freed_memory()
    before = resident_bytes("VmRSS")
    run()
    sender.send(resident_bytes("VmHWM") - before)
