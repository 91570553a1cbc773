import logging

import pytest
import torch
from torch import nn

from lrrobust.models.lrnet import lr_resnet26
from lrrobust.models.resnet import resnet26
from lrrobust.training.recorded import RecordedPasses


@pytest.fixture
def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 2))


@pytest.fixture
def recorder(monkeypatch):
    """In place of torch's, which needs a GPU: warms up likewise, and likewise takes the place of `forward`."""
    recorded = []

    def record(network, examples):
        (images,) = examples
        own = network.forward
        for _ in range(3):
            torch.autograd.grad(own(images).sum(), list(network.parameters()))
        recorded.append(images.shape)

        def forward(found):
            assert found.shape == images.shape, "a recording holds for one shape"
            return own(found)

        network.forward = forward

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", record)
    return recorded


def batch(side=8):
    return torch.rand(6, 3, side, side)


def test_statistics_are_those_of_the_passes_that_count(network, recorder):
    with torch.no_grad():
        network(batch())
    state = {name: value.clone() for name, value in network.state_dict().items()}
    images = batch()
    expected = network(images)
    after = {name: value.clone() for name, value in network.state_dict().items()}
    network.load_state_dict(state)
    assert torch.equal(RecordedPasses(network, "float32")(images), expected)
    assert recorder == [images.shape]
    for name, value in network.state_dict().items():
        assert torch.equal(value, after[name]), name


def test_one_recording_a_shape_and_the_network_stays_free_for_others(network, recorder):
    with torch.no_grad():
        network(batch())
    passes = RecordedPasses(network, "float32")
    for images in (batch(), batch(), batch()[:4], batch()):
        passes(images).sum().backward()
    assert recorder == [torch.Size((6, 3, 8, 8)), torch.Size((4, 3, 8, 8))]
    assert network[0].weight.grad.abs().sum() > 0
    network(batch()[:2])
    assert "forward" not in vars(network)


def test_autocast_reaches_the_passes(network, recorder):
    with torch.no_grad():
        network(batch())
    assert RecordedPasses(network, "bf16")(batch()).dtype == torch.bfloat16
    assert RecordedPasses(network, "float32")(batch()).dtype == torch.float32


def test_what_cannot_be_recorded_runs_as_it_is_and_says_so_once(network, monkeypatch, caplog):
    def refuse(network, examples):
        network(examples[0])
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", refuse)
    with torch.no_grad():
        network(batch())
    before = network[1].running_mean.clone()
    passes = RecordedPasses(network.eval(), "float32")
    images = batch()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert torch.equal(passes(images), network(images))
    (record,) = caplog.records
    assert "operation not permitted when stream is capturing" in record.getMessage()
    assert torch.equal(network[1].running_mean, before)


def test_memory_that_runs_out_is_for_the_caller(network, monkeypatch):
    def run_out(network, examples):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", run_out)
    with pytest.raises(torch.OutOfMemoryError):
        RecordedPasses(network, "float32")(batch())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS")
@pytest.mark.parametrize("build", [lr_resnet26, resnet26])
def test_on_a_gpu(build):
    torch.manual_seed(0)
    network = build(5).cuda().to(memory_format=torch.channels_last)
    state = {name: value.clone() for name, value in network.state_dict().items()}
    batches = [torch.rand(8, 3, side, side, device="cuda").contiguous(memory_format=torch.channels_last) for side in (64, 48, 64)]

    def follow(passes):
        network.load_state_dict(state)
        found = []
        for images in batches:
            network.zero_grad(set_to_none=True)
            logits = passes(images)
            logits.logsumexp(1).sum().backward()
            found += [logits.detach().clone(), network.classifier.weight.grad.clone(), network.stages[0][0].reduce[0].weight.grad.clone()]
        return found, {name: value.clone() for name, value in network.state_dict().items()}

    passes = RecordedPasses(network, "float32")
    (found, after), (expected, after_expected) = follow(passes), follow(network)
    assert not passes._gave_up
    for one, other in zip([*found, *after.values()], [*expected, *after_expected.values()], strict=True):
        assert (one - other).abs().max() <= 2e-3 * other.abs().max()
