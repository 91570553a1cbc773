import importlib.machinery
import math
import sys
import types

import pandas as pd
import pytest
import torch

from lrrobust.bench.local_relation import CONVOLUTION, COPY, NATTEN, SLICES, Stage, compare_operations, sum_of_slices
from lrrobust.ops import local_relation


@pytest.mark.parametrize("stride", [1, 2])
def test_slices_compute_the_same(stride):
    generator = torch.Generator().manual_seed(0)

    def maps(channels, height, width):
        return torch.randn(2, channels, height, width, generator=generator, dtype=torch.float64)

    # 20 channels make three groups, the last of them smaller.
    inputs = (maps(3, -(-9 // stride), -(-6 // stride)), maps(3, 9, 6), maps(20, 9, 6))
    geometry = torch.randn(3, 7, 7, generator=generator, dtype=torch.float64)
    expected = local_relation(*inputs, geometry, kernel_size=7, stride=stride, backend="reference")
    torch.testing.assert_close(sum_of_slices(*inputs, geometry, stride=stride), expected)


def test_every_way_is_timed_at_every_stage():
    stages = (Stage("small", 16, 8, 1, 16), Stage("strided", 12, 8, 2))
    frame = pd.DataFrame(compare_operations(stages, batch_size=2, repeats=2, with_memory=False))
    named = frame.groupby("stage").name.unique().map(set)
    backends = {"reference", "unfold", "cpu"}
    assert named["small"] == backends | {SLICES, CONVOLUTION, COPY} and named["strided"] == backends | {SLICES, COPY}
    assert (frame.wall_s > 0).all() and (frame.groupby(["stage", "name"]).size() == 2).all()
    # query and key 2*2*8*8 each, value and output 2*16*8*8 each; all but nothing twice, with gradients; 4 bytes.
    small = frame[frame.stage == "small"].io_bytes.unique()
    assert small == [4 * 2 * (2 * 2 * 2 * 64 + 2 * 2 * 16 * 64)]


@pytest.fixture
def natten(monkeypatch):
    """Stands in for natten, which wants a compiler; notes the shapes that it is given."""
    module = types.ModuleType("natten")
    module.__spec__ = importlib.machinery.ModuleSpec("natten", None)
    module.shapes = []

    def na2d(query, key, value, kernel_size):
        module.shapes.append((tuple(query.shape), kernel_size))
        return (query * key).sum(-1, keepdim=True) * value

    module.na2d = na2d
    monkeypatch.setitem(sys.modules, "natten", module)
    return module


def test_natten_takes_part_where_it_is_installed(natten):
    stages = (Stage("small", 20, 8, 1, 16), Stage("strided", 12, 8, 2))
    frame = pd.DataFrame(compare_operations(stages, batch_size=2, repeats=2, with_memory=False))
    assert set(frame[frame.name == NATTEN].stage) == {"small"}
    assert set(natten.shapes) == {((2, 8, 8, 3, 8), 7)}  # 20 channels are three groups of 8


def test_natten_that_has_no_kernel_is_left_out_aloud(natten, monkeypatch, caplog):
    def refuse(*_, **__):
        raise NotImplementedError("no kernel for 8 channels")

    monkeypatch.setattr(natten, "na2d", refuse)
    frame = pd.DataFrame(compare_operations((Stage("small", 16, 8, 1, 16),), batch_size=2, repeats=1, with_memory=False))
    assert NATTEN not in set(frame.name) and COPY in set(frame.name)
    assert caplog.messages == ["small: without natten, which says NotImplementedError: no kernel for 8 channels"]


def test_memory_of_the_fused_loop_is_measured():
    frame = pd.DataFrame(compare_operations((Stage("map", 64, 32),), batch_size=4, repeats=1))
    peaks = frame.groupby("name").peak_bytes.first()
    assert math.isnan(peaks[SLICES])
    assert 0 < peaks["cpu"] < peaks["reference"]
