import threading
import weakref

import pytest

from lrrobust.evaluation.chunks import plan_chunks
from lrrobust.evaluation.prefetch import Prefetch

CHUNKS = plan_chunks(20, 2)


def test_the_next_is_read_while_the_present_one_is_at_work():
    read = {chunk: threading.Event() for chunk in CHUNKS}
    with Prefetch(lambda chunk: read[chunk].set() or chunk) as prefetch:
        assert prefetch.get(CHUNKS[0]) == CHUNKS[0]
        assert not read[CHUNKS[1]].is_set()
        prefetch.start(CHUNKS[1])
        assert read[CHUNKS[1]].wait(10)  # nobody asked yet
        prefetch.start(CHUNKS[1])
        assert prefetch.get(CHUNKS[1]) == CHUNKS[1]


def test_each_is_read_once_and_a_wrong_guess_does_no_harm():
    read = []
    with Prefetch(lambda chunk: read.append(chunk) or chunk) as prefetch:
        for chunk, guess in zip(CHUNKS[:4], [CHUNKS[1], CHUNKS[2], CHUNKS[9], None]):
            assert prefetch.get(chunk) == chunk
            prefetch.start(guess)
    assert [chunk for chunk in read if chunk != CHUNKS[9]] == CHUNKS[:4]


def test_errors_come_when_the_chunk_is_asked_for():
    def load(chunk):
        if chunk == CHUNKS[1]:
            raise OSError("gone")
        return chunk

    with Prefetch(load) as prefetch:
        prefetch.start(CHUNKS[1])
        assert prefetch.get(CHUNKS[0]) == CHUNKS[0]
        with pytest.raises(OSError, match="gone"):
            prefetch.get(CHUNKS[1])
        prefetch.start(CHUNKS[1])
        with pytest.raises(OSError, match="gone"):
            prefetch.get(CHUNKS[1])


def test_two_chunks_are_in_memory_at_most():
    class Pixels:
        pass

    alive, loaded = weakref.WeakSet(), threading.Semaphore(0)

    def load(chunk):
        pixels = Pixels()
        alive.add(pixels)
        loaded.release()
        return pixels

    with Prefetch(load) as prefetch:
        for place, chunk in enumerate(CHUNKS[:-1]):
            pixels = prefetch.get(chunk)
            if place == 0:
                assert loaded.acquire(timeout=10) and len(alive) == 1
            prefetch.start(CHUNKS[place + 1])
            assert loaded.acquire(timeout=10)
            assert len(alive) == 2
            del pixels
