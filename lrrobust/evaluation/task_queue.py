"""What is still to be done of a run, by one process or by several that share it through its folder."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from lrrobust.evaluation.chunks import Chunk
from lrrobust.evaluation.tasks import Task
from lrrobust.results import PartId, RunStore

#: Seconds between two looks at what the others do, at first and at most, while there is nothing to do. Growing by a tenth
#: they are about a tenth of the wait so far: nobody sleeps much longer than the others work.
_FIRST_PAUSE_S, _LONGEST_PAUSE_S, _PAUSE_GROWTH = 0.05, 5.0, 1.1


@dataclass(frozen=True)
class Sharing:
    """How a process shares a run with others that evaluate the same; nothing but speed depends on it.

    Args:
        rank, world_size: ranks begin at different images, so that they rarely want the same. Rank 0
            alone checks whether parts that others wrote are whole. Processes that were started by
            hand are all of rank 0.
        lease_s: seconds without a forward pass after which others may take over what a process is at.
    """

    rank: int = 0
    world_size: int = 1
    lease_s: float = 60.0


class TaskQueue:
    """Iterates over the tasks that this process is to do; each must be stored before the next is asked for.

    Alone, these are all that the store does not hold. With `sharing` a task goes to whoever takes it
    first; iteration ends when all are stored, by whomever, and takes over what processes leave that give no
    sign of life.

    Args:
        tasks: of the whole run, chunk by chunk.
        store: of the run.
        sharing: None for a process that has the run alone.
        on_stored: called once with every task that was stored, but not here.
        sleep: waits for so many seconds.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        store: RunStore,
        sharing: Sharing | None,
        on_stored: Callable[[Task], None],
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._store = store
        self._sharing = sharing
        self._on_stored = on_stored
        self._sleep = sleep
        self._leases = None if sharing is None else store.leases(sharing.lease_s)
        #: Every chunk's place in the order of this process, and what is not done, by the name of its part, in that order.
        self._place = _places(tasks, sharing)
        # The sort is stable: the attacks on a chunk stay in their order.
        self._open = {_name(task): task for task in sorted(tasks, key=lambda task: self._place[task.chunk])}
        self._needed = _needed(tasks)
        #: Names of parts that other processes were at, when last looked.
        self._taken: set[str] = set()
        #: What others stored, and nobody has looked through yet.
        self._unchecked: list[Task] = []

    def __enter__(self) -> TaskQueue:
        return self

    def __exit__(self, *_: object) -> None:
        if self._leases is not None:
            self._leases.close()

    def __iter__(self) -> Iterator[Task]:
        pause_s = _FIRST_PAUSE_S
        while True:
            if (name := self._take()) is not None:
                yield self._open[name]
                del self._open[name]
                if self._leases is not None:
                    self._leases.release(name)
                pause_s = _FIRST_PAUSE_S
            elif self._open:
                self._sleep(min(pause_s, self._sharing.lease_s / 4))
                pause_s = min(_PAUSE_GROWTH * pause_s, _LONGEST_PAUSE_S)
            elif not self._reopen_damaged():
                return

    def drop_stored(self) -> list[Task]:
        """The tasks that the store holds by now; they are not asked for any more."""
        present = self._store.present_parts()
        is_checking = self._is_checking()
        stored = []
        for name in [name for name in self._open if name in present]:
            task = self._open[name]
            if not is_checking or self._store.has_part(*task.part):
                del self._open[name]
                self._on_stored(task)
                stored.append(task)
        return stored

    def chunk_after(self, chunk: Chunk) -> Chunk | None:
        """The chunk that this process will probably need next."""
        for name, task in self._open.items():
            if self._place[task.chunk] > self._place[chunk] and name not in self._taken:
                return task.chunk
        return None

    def earlier(self, task: Task) -> Sequence[Task]:
        """Those on the same images whose results a task builds upon; they are stored when it is asked for."""
        return self._needed.get(_name(task), ())

    def renew(self) -> None:
        """Tells the others that this process gets on."""
        if self._leases is not None:
            self._leases.renew()

    def _is_checking(self) -> bool:
        return self._sharing is None or self._sharing.rank == 0

    def _take(self) -> str | None:
        """The next task's name, held by a lease where the run is shared; None where there is nothing to do, now or at all."""
        if self._leases is None:
            return next(iter(self._open), None)
        self._drop_done_elsewhere()
        self._taken = self._leases.taken()
        for name in self._open:
            if name not in self._taken and self._is_ready(name) and self._is_mine(name, self._leases.acquire):
                return name
        for name in self._open:
            if name in self._taken and self._is_ready(name) and self._is_mine(name, self._leases.take_over):
                return name
        return None

    def _is_ready(self, name: str) -> bool:
        return not any(_name(earlier) in self._open for earlier in self._needed.get(name, ()))

    def _is_mine(self, name: str, take: Callable[[str], bool]) -> bool:
        if not take(name):
            return False
        # Whoever had it may have finished it since the last look.
        if name not in self._store.present_parts():
            return True
        self._leases.release(name)
        return False

    def _drop_done_elsewhere(self) -> None:
        present = self._store.present_parts()
        for name in [name for name in self._open if name in present]:
            task = self._open.pop(name)
            self._unchecked.append(task)
            self._on_stored(task)

    def _reopen_damaged(self) -> bool:
        """At the end, rank 0 looks through what others stored; whether something has to be done again."""
        if self._is_checking():
            damaged = [task for task in self._unchecked if not self._store.has_part(*task.part)]
            self._open = {_name(task): task for task in damaged}
        self._unchecked = []
        return bool(self._open)


def _places(tasks: Sequence[Task], sharing: Sharing | None) -> dict[Chunk, int]:
    chunks = list(dict.fromkeys(task.chunk for task in tasks))
    first = 0 if sharing is None else len(chunks) * (sharing.rank % sharing.world_size) // sharing.world_size
    return {chunk: (place - first) % len(chunks) for place, chunk in enumerate(chunks)}


def _needed(tasks: Sequence[Task]) -> dict[str, list[Task]]:
    """By name: the tasks before it on the same chunk and in the same norm, for those that meet survivors only."""
    before: dict[Chunk, list[Task]] = {}
    needed = {}
    for task in tasks:
        on_chunk = before.setdefault(task.chunk, [])
        if task.spec.survivors_only:
            needed[_name(task)] = [earlier for earlier in on_chunk if earlier.spec.norm == task.spec.norm]
        on_chunk.append(task)
    return needed


def _name(task: Task) -> str:
    return sys.intern(PartId(*task.part).stem)
