import pytest
import torch

from lrrobust import half_precision
from lrrobust.half_precision import bf16_slowdown


@pytest.mark.parametrize("seconds", [{torch.float32: 1.0, torch.bfloat16: 14.0}, {torch.float32: 2.0, torch.bfloat16: 1.0}])
def test_slowdown_is_the_time_in_bf16_by_that_in_float32(seconds, monkeypatch):
    # A clock that the products themselves move.
    now = [0.0]

    class Matrix:
        def __init__(self, dtype):
            self.dtype = dtype

        def __matmul__(self, other):
            now[0] += seconds[self.dtype]

    monkeypatch.setattr(half_precision.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(half_precision.torch, "ones", lambda *size, dtype: Matrix(dtype))
    assert bf16_slowdown(torch.device("cpu")) == seconds[torch.bfloat16] / seconds[torch.float32]


def test_what_is_measured_is_a_time():
    assert bf16_slowdown(torch.device("cpu")) > 0


def test_other_devices_are_not_measured(monkeypatch):
    monkeypatch.setattr(half_precision, "_product_s", lambda dtype: pytest.fail("measured"))
    assert bf16_slowdown(torch.device("cuda")) == 1
