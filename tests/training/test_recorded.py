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


def test_one_recording_as_long_as_the_shape_lasts_and_the_network_stays_free_for_others(network, recorder):
    with torch.no_grad():
        network(batch())
    passes = RecordedPasses(network, "float32")
    for images in (batch(), batch(), batch()[:4], batch()[:4], batch()):
        passes(images).sum().backward()
    assert recorder == [torch.Size((6, 3, 8, 8)), torch.Size((4, 3, 8, 8)), torch.Size((6, 3, 8, 8))]
    assert network[0].weight.grad.abs().sum() > 0
    network(batch()[:2])
    assert "forward" not in vars(network)


def test_autocast_reaches_the_passes(network, recorder):
    with torch.no_grad():
        network(batch())
    assert RecordedPasses(network, "bf16")(batch()).dtype == torch.bfloat16
    assert RecordedPasses(network, "float32")(batch()).dtype == torch.float32


@pytest.mark.parametrize(
    "error", [RuntimeError("operation not permitted\nwhen stream is capturing"), torch.OutOfMemoryError("CUDA out\nof memory")]
)
def test_what_cannot_be_recorded_runs_as_it_is_and_says_so_once(network, monkeypatch, caplog, error):
    def refuse(network, examples):
        network(examples[0])
        raise error

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", refuse)
    network[1].eval()
    passes = RecordedPasses(network, "float32")
    images = batch()
    network[1].train()
    before = network[1].running_mean.clone()
    with caplog.at_level(logging.WARNING):
        passes(images)
        # Moved by the pass that counts, and not by the one that failed.
        assert torch.allclose(network[1].running_mean, 0.9 * before + 0.1 * network[0](images).mean((0, 2, 3)), atol=1e-6)
        assert torch.equal(passes(images), network(images))
    (record,) = caplog.records
    assert " ".join(str(error).split()) in record.getMessage()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS")
@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 2e-3), ("bf16", 5e-2)])
@pytest.mark.parametrize("build", [lr_resnet26, resnet26])
def test_on_a_gpu(build, precision, tolerance):
    torch.manual_seed(0)
    network = build(5).cuda().to(memory_format=torch.channels_last)
    for name, parameter in network.named_parameters():
        if name.endswith("expand.1.weight"):  # residual branches start at zero, and would take no part
            nn.init.uniform_(parameter, 0.5, 1)
    state = {name: value.clone() for name, value in network.state_dict().items()}
    batches = [
        torch.rand(8, 3, side, side, device="cuda").contiguous(memory_format=torch.channels_last) for side in (64, 48, 48)
    ]

    def plain(images):
        with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16"):
            return network(images)

    def follow(passes):
        network.load_state_dict(state)
        found = {}
        for i, images in enumerate(batches):
            network.zero_grad(set_to_none=True)
            logits = passes(images)
            logits.float().logsumexp(1).sum().backward()
            found |= {f"logits {i}": logits.detach().clone()}
            found |= {f"{name} {i}": parameter.grad.clone() for name, parameter in network.named_parameters()}
        return found | {name: value.clone() for name, value in network.state_dict().items()}

    passes = RecordedPasses(network, precision)
    found, expected = follow(passes), follow(plain)
    assert not passes._gave_up
    for name, other in expected.items():
        assert (found[name] - other).abs().max() <= tolerance * other.abs().max() + 1e-6, name
    assert all(expected[f"{name} 2"].abs().max() > 0 for name, _ in network.named_parameters() if "reduce" in name)
