import multiprocessing
import os
import time
from concurrent.futures.process import BrokenProcessPool

import pytest

from lrrobust.report import drawing
from lrrobust.report.drawing import Drawers, Drawing, Sketch


def sketch(number, render=dict, arguments=None):
    return Sketch(
        "cd", f"figure_{number}", "A figure.", render, ([("png", bytes([number]))],) if arguments is None else arguments
    )


def draw(sketches):
    with Drawers() as drawers:
        return drawers.begin(sketches)()


def expected(count):
    return [Drawing("cd", f"figure_{number}", "A figure.", {"png": bytes([number])}) for number in range(count)]


def name_process(seconds):
    time.sleep(seconds)
    return os.getpid()


def test_few_figures_are_drawn_here():
    assert draw([sketch(0), sketch(1)]) == expected(2) and draw([]) == []
    assert draw([sketch(0, os.getpid, ())])[0].files == os.getpid()


def test_many_figures_are_drawn_by_two_processes(monkeypatch):
    monkeypatch.setattr(drawing, "count_cores", lambda: 2)
    drawn = draw([sketch(number, name_process, (0.1,)) for number in range(9)])
    pids = [each.files for each in drawn]
    assert [each.stem for each in drawn] == [f"figure_{number}" for number in range(9)]
    assert pids[-1] == os.getpid() != pids[0] and len(set(pids)) == 2
    # Nobody is left behind.
    with pytest.raises(ProcessLookupError):
        os.kill(pids[0], 0)


def test_what_is_begun_later_is_shared_as_well(monkeypatch):
    monkeypatch.setattr(drawing, "count_cores", lambda: 2)
    with Drawers() as drawers:
        # The other process is busy with the first for as long as it takes to draw all others.
        first = drawers.begin(
            [sketch(0, name_process, (2.0,)), *(sketch(number, name_process, (0.0,)) for number in range(1, 9))]
        )
        later = [drawers.begin([sketch(number, name_process, (0.02,)) for number in range(3)]) for _ in range(4)]
        pids = [[each.files for each in collect()] for collect in (first, *later)]
        assert [[each.files for each in collect()] for collect in (first, *later)] == pids
    assert pids[0][0] != os.getpid() and pids[1:] == [[os.getpid()] * 3] * 4


@pytest.mark.parametrize(("figures", "is_shared"), [(7, False), (8, True)])
def test_who_expects_many_figures_has_the_other_process_started(monkeypatch, figures, is_shared):
    monkeypatch.setattr(drawing, "count_cores", lambda: 2)
    with Drawers() as drawers:
        drawers.expect(figures)
        assert drawers.begin([sketch(0), sketch(1)])() == expected(2)
        assert bool(multiprocessing.active_children()) == is_shared
    assert not multiprocessing.active_children()


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
    with pytest.raises(ValueError, match="could not convert"):
        draw([sketch(8, float, ("no number",)), *(sketch(number, name_process, (0.1,)) for number in range(20))])
