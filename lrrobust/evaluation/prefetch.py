"""Images of the next chunk are read while the present one is attacked."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

from lrrobust.evaluation.chunks import Chunk

T = TypeVar("T")


class Prefetch(Generic[T]):
    """Loads chunks one ahead, on a thread of its own: two at most are in memory, the present and the next.

    Args:
        load: safe to call on another thread, one call at a time.
    """

    def __init__(self, load: Callable[[Chunk], T]) -> None:
        self._load = load
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="lrrobust-prefetch")
        self._chunk: Chunk | None = None
        self._next: Future[T] | None = None

    def __enter__(self) -> Prefetch[T]:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def start(self, chunk: Chunk | None) -> None:
        """Begins with a chunk, unless that is being done; a chunk begun before is given up."""
        if chunk is None or chunk == self._chunk:
            return
        self._give_up()
        self._chunk, self._next = chunk, self._thread.submit(self._load, chunk)

    def get(self, chunk: Chunk) -> T:
        """The chunk, at once where it was started in time; raises what loading it raises."""
        if chunk != self._chunk:
            self._give_up()
            return self._thread.submit(self._load, chunk).result()
        loaded, self._chunk, self._next = self._next, None, None
        return loaded.result()

    def _give_up(self) -> None:
        if self._next is not None:
            self._next.cancel()
        self._chunk, self._next = None, None
