import multiprocessing
import sys
from multiprocessing.connection import Connection

import pytest
import torch

from lrrobust.bench.peak_memory import measure_peak_bytes


def prepare_blocks(megabytes):
    """Two blocks held at once, then freed, and a third after them."""

    def run(size):
        held = [torch.ones(size, dtype=torch.uint8), torch.ones(size, dtype=torch.uint8)]
        held.clear()
        return torch.ones(size, dtype=torch.uint8)

    return lambda: run(1 << 10), lambda: run(megabytes << 20)


def prepare_after_rubbish(megabytes):
    """A block beside much that the preparation has held in small pieces and freed but for the last."""
    pieces = [torch.ones(1 << 16, dtype=torch.uint8) for _ in range(16 * 2 * megabytes)]
    del pieces[:-1]
    return lambda: pieces, lambda: torch.ones(megabytes << 20, dtype=torch.uint8)


def prepare_holes(megabytes):
    """Half of many small blocks freed, each between two that stay, and then larger ones that fit into no hole."""

    def run(size):
        # Freed once, blocks as large as this come from glibc's heap from then on.
        torch.ones(16 << 20, dtype=torch.uint8)
        blocks = [torch.ones(size, dtype=torch.uint8) for _ in range(megabytes)]
        del blocks[::2]
        return blocks, [torch.ones(2 * size, dtype=torch.uint8) for _ in range(megabytes // 4)]

    return lambda: run(1 << 10), lambda: run(1 << 20)


def prepare_exit():
    return lambda: sys.exit(3), lambda: None


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="read from /proc")
@pytest.mark.parametrize(("prepare", "megabytes"), [(prepare_blocks, 200), (prepare_after_rubbish, 100), (prepare_holes, 100)])
def test_peak_is_what_was_held_at_once_whatever_the_preparation_has_freed(prepare, megabytes):
    assert measure_peak_bytes(prepare, 100) == pytest.approx(megabytes << 20, rel=0.05)


def test_a_failure_there_is_said_here():
    with pytest.raises(RuntimeError, match=r"prepare_exit\(\) ended with exit code 3"):
        measure_peak_bytes(prepare_exit)


def test_an_interruption_leaves_no_process_behind(monkeypatch):
    def interrupted(receiver):
        raise KeyboardInterrupt

    monkeypatch.setattr(Connection, "recv", interrupted)
    with pytest.raises(KeyboardInterrupt):
        measure_peak_bytes(prepare_exit)
    assert not multiprocessing.active_children()
