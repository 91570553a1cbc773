import sys

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


def prepare_exit():
    return lambda: sys.exit(3), lambda: None


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="read from /proc")
def test_peak_is_what_was_held_at_once():
    assert measure_peak_bytes(prepare_blocks, 100) == pytest.approx(200 << 20, rel=0.05)


def test_a_failure_there_is_said_here():
    with pytest.raises(RuntimeError, match=r"prepare_exit\(\) ended with exit code 3"):
        measure_peak_bytes(prepare_exit)
