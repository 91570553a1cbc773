import os
from concurrent.futures.process import BrokenProcessPool

import pytest

from lrrobust.report import drawing
from lrrobust.report.drawing import Drawing, Sketch, draw


def sketch(number, render=dict, arguments=None):
    return Sketch("cd", f"figure_{number}", "A figure.", render, ([("png", bytes([number]))],) if arguments is None else arguments)


def expected(count):
    return [Drawing("cd", f"figure_{number}", "A figure.", {"png": bytes([number])}) for number in range(count)]


def test_few_figures_are_drawn_here():
    assert draw([sketch(0), sketch(1)]) == expected(2) and draw([]) == []
    assert draw([sketch(0, os.getpid, ())])[0].files == os.getpid()


def test_many_figures_are_drawn_by_two_processes(monkeypatch):
    monkeypatch.setattr(drawing, "count_cores", lambda: 2)
    drawn = draw([sketch(number, os.getpid, ()) for number in range(9)])
    pids = [each.files for each in drawn]
    assert [each.stem for each in drawn] == [f"figure_{number}" for number in range(9)]
    assert pids[0] == os.getpid() != pids[-1] and len(set(pids)) == 2
    # Nobody is left behind.
    with pytest.raises(ProcessLookupError):
        os.kill(pids[-1], 0)


class Broken:
    """A pool whose process ends at the start, or before its first answer."""

    def __init__(self, at_start):
        self.at_start = at_start

    def submit(self, *_):
        if self.at_start:
            raise BrokenProcessPool("gone")
        return self

    def cancel(self):
        return False

    def result(self):
        raise BrokenProcessPool("gone")

    def shutdown(self, **_):
        self.is_shut_down = True


@pytest.mark.parametrize("at_start", [True, False])
def test_a_process_that_ends_is_done_without(monkeypatch, at_start):
    pool = Broken(at_start)
    monkeypatch.setattr(drawing, "count_cores", lambda: 2)
    monkeypatch.setattr(drawing, "ProcessPoolExecutor", lambda *_, **__: pool)
    assert draw([sketch(number) for number in range(9)]) == expected(9) and pool.is_shut_down


def test_errors_of_either_process_come_through(monkeypatch):
    monkeypatch.setattr(drawing, "count_cores", lambda: 2)
    with pytest.raises(ValueError, match="could not convert"):
        draw([*(sketch(number) for number in range(8)), sketch(8, float, ("no number",))])
