import inspect
import os
import signal
import sys
import time

import pytest

from lrrobust.errors import StoreError
from lrrobust.results import leases as module
from lrrobust.results.leases import Leases, clear_leases


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def pair(tmp_path, clock):
    """Two processes as one folder sees them."""
    return tuple(Leases(tmp_path / "leases", 60.0, clock) for _ in range(2))


def test_one_gets_it_and_the_other_after_it_is_given_back(pair):
    first, second = pair
    assert first.acquire("a") and not second.acquire("a") and not first.acquire("a")
    assert second.acquire("b")
    assert first.taken() == second.taken() == {"a", "b"}
    second.release("a")  # not its own
    assert not second.acquire("a")
    first.release("a")
    assert second.acquire("a") and second.taken() == {"a", "b"}


def test_windows_has_it_too(pair, monkeypatch):
    monkeypatch.delattr(os, "O_CLOEXEC", raising=False)
    first, second = pair
    assert first.acquire("a") and not second.acquire("a")


def test_closing_gives_back_what_is_held(pair):
    first, second = pair
    assert first.acquire("a") and first.acquire("b") and second.acquire("c")
    first.close()
    assert second.taken() == {"c"}


class Ended(KeyboardInterrupt):
    pass


def end_at_line(count):
    """Raises SIGTERM before the `count`th line that is executed in the module; says whether there was one."""
    left = [count]

    def trace(frame, event, _):
        if frame.f_code.co_filename != module.__file__:
            return None
        if event == "line":
            left[0] -= 1
            if left[0] == 0:
                signal.raise_signal(signal.SIGTERM)
        return trace

    sys.settrace(trace)
    return left


@pytest.mark.parametrize("content", [None, b"somebody who died"], ids=["free", "abandoned"])
def test_a_signal_at_any_line_leaves_no_lease_behind(tmp_path, clock, content):
    def stop(signum, _):
        raise Ended

    before, tracing = signal.signal(signal.SIGTERM, stop), sys.gettrace()
    ends = 0
    try:
        while True:
            folder = tmp_path / str(ends)
            leases = Leases(folder, 60.0, clock)
            if content is not None:
                folder.mkdir()
                (folder / "a").write_bytes(content)
                assert not leases.take_over("a")
                clock.now += 100
            left = end_at_line(ends + 1)
            try:
                assert leases.acquire("a") if content is None else leases.take_over("a")
                leases.release("a")
            except Ended:
                pass
            finally:
                sys.settrace(tracing)
            leases.close()
            left_behind = [path for path in folder.iterdir() if path.read_bytes() != content] if folder.is_dir() else []
            assert left_behind == []
            if left[0] > 0:
                break
            ends += 1
    finally:
        signal.signal(signal.SIGTERM, before)
    assert ends > 10


def test_no_folder_is_no_lease(pair):
    assert pair[0].taken() == set()


def test_a_silent_holder_loses_it(pair, clock):
    first, second = pair
    assert first.acquire("a")
    # Not at first sight, however long ago it was taken: the watcher's own clock counts.
    clock.now += 1000
    assert not second.take_over("a")
    clock.now += 59
    assert not second.take_over("a")
    clock.now += 1
    assert second.take_over("a") and second.taken() == {"a"}
    # The former holder notices, and leaves the other's alone.
    clock.now += 100
    first.renew()
    first.release("a")
    assert second.taken() == {"a"}
    assert not first.acquire("a")


def test_a_holder_that_gets_on_keeps_it(pair, clock):
    first, second = pair
    assert first.acquire("a")
    for _ in range(20):
        assert not second.take_over("a")
        clock.now += 30
        first.renew()
    assert first.taken() == {"a"}


def test_renewing_often_costs_nothing(pair, clock, tmp_path):
    first, _ = pair
    assert first.acquire("a")
    path = tmp_path / "leases" / "a"
    before = path.read_bytes()
    for _ in range(99):
        clock.now += 0.1
        first.renew()
    assert path.read_bytes() == before
    clock.now += 0.2
    first.renew()
    assert path.read_bytes() != before and len(path.read_bytes()) == len(before)


def test_a_holder_killed_while_it_took_the_lease_loses_it_too(pair, clock, tmp_path):
    (tmp_path / "leases").mkdir()
    (tmp_path / "leases" / "a").touch()
    assert not pair[0].acquire("a") and not pair[0].take_over("a")
    clock.now += 61
    assert pair[0].take_over("a")


def test_what_was_given_back_meanwhile_is_taken(pair):
    first, second = pair
    assert first.acquire("a") and not second.take_over("a")
    first.release("a")
    assert second.take_over("a")


def test_of_two_that_take_over_at_once_one_gets_it(tmp_path, clock, monkeypatch):
    dead, first, second = (Leases(tmp_path, 60.0, clock) for _ in range(3))
    assert dead.acquire("a") and not first.take_over("a") and not second.take_over("a")
    clock.now += 61
    rename, won = os.rename, []

    def faster(source, target):
        monkeypatch.setattr(os, "rename", rename)
        won.append(second.take_over("a"))
        rename(source, target)

    monkeypatch.setattr(os, "rename", faster)
    # The slower one renames the faster one's lease: both compute the part, and store the same.
    assert first.take_over("a") and won == [True]
    second.release("a")
    assert first.taken() == {"a"}


def test_clearing(pair, tmp_path):
    assert pair[0].acquire("a") and pair[1].acquire("b")
    clear_leases(tmp_path / "leases")
    assert pair[0].taken() == set()
    clear_leases(tmp_path / "nowhere")


def test_what_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "leases").write_text("a file")
    with pytest.raises(StoreError, match="could not write .*leases") as caught:
        Leases(tmp_path / "leases", 60.0).acquire("a")
    assert "\n" not in str(caught.value)


def test_the_clock_is_one_that_cannot_be_set():
    # Nobody sets the computer's clock in a test; a lease must not follow it all the same.
    assert inspect.signature(Leases).parameters["clock"].default is time.monotonic
