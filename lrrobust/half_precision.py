"""Whether bfloat16 pays on a device: processors without instructions for it emulate it, many times slower."""

from __future__ import annotations

import time

import torch

#: Side of the matrices that are multiplied: large enough to be arithmetic, small enough to take milliseconds.
_SIDE = 256


def bf16_slowdown(device: torch.device) -> float:
    """How many times as long as in float32 a matrix product takes in bfloat16; below 1 where it is faster.

    Measured, since no list of instructions says what a library makes of them. 1 where the device is no CPU: GPUs
    without bfloat16 are refused by torch itself.
    """
    if device.type != "cpu":
        return 1.0
    return _product_s(torch.bfloat16) / _product_s(torch.float32)


def _product_s(dtype: torch.dtype) -> float:
    """The least of a few times: what else the machine does can only add."""
    left = torch.ones(_SIDE, _SIDE, dtype=dtype)
    times = []
    for _ in range(4):  # the first one also loads what it needs
        started = time.perf_counter()
        left @ left
        times.append(time.perf_counter() - started)
    return min(times)
