import pandas as pd
import pytest
import torch

from lrrobust.bench import gradient_step
from lrrobust.bench.gradient_step import CONTROL, NETWORK, build_step, compare_gradient_steps
from lrrobust.models.lrnet import LocalRelationLayer


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def test_a_fixed_backend_is_the_one_that_runs(monkeypatch):
    used = set()
    forward = LocalRelationLayer.forward
    monkeypatch.setattr(LocalRelationLayer, "forward", lambda layer, x: used.add(layer.backend) or forward(layer, x))
    gradient = build_step(f"{NETWORK}, reference", 16, 1, torch.device("cpu"))()
    assert used == {"reference"} and gradient.shape == (1, 3, 16, 16) and gradient.abs().max() > 0
    build_step(NETWORK, 16, 1, torch.device("cpu"))()
    assert used == {"reference", "auto"}


def test_networks_side_by_side():
    turns = []
    frame = pd.DataFrame(compare_gradient_steps((16,), batch_size=1, repeats=1, with_memory=False, on_turn=turns.append))
    assert list(frame.name) == [CONTROL, NETWORK, CONTROL, f"{NETWORK}, reference"]
    assert list(frame.case) == ["fused", "fused", "reference", "reference"]
    assert set(frame["size"]) == {16} and set(frame.batch_size) == {1} and (frame.wall_s > 0).all()
    assert turns[0] == f"16 pixels, fused: {CONTROL}, warming up"
    assert turns[-1] == f"16 pixels, reference: {NETWORK}, reference, round 1 of 1"


def test_batches_are_as_large_as_their_images_allow(monkeypatch):
    monkeypatch.setattr(gradient_step, "build_step", lambda *arguments, **options: lambda: None)
    frame = pd.DataFrame(compare_gradient_steps((32, 64, 224, 640), repeats=1, with_memory=False))
    assert frame.groupby("size").batch_size.first().to_dict() == {32: 32, 64: 32, 224: 4, 640: 1}
