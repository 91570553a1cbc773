import copy
import logging

import pytest
import torch

from lrrobust.determinism import deterministic_float32
from lrrobust.gradient_rules import GradientRule, gradients_by
from lrrobust.models import replay
from lrrobust.models.folding import fold_constants
from lrrobust.models.lrnet import lr_resnet26
from lrrobust.models.replay import ReplayedNetwork, replayed
from lrrobust.models.resnet import resnet26


class RecordingOnCpu:
    """Has a CUDA recording's fixed memory and its one set of intermediate results in the shared pool, but computes anew."""

    made: list["RecordingOnCpu"] = []
    stands = None

    def __init__(self, network, images, needs_gradient, pool):
        self.network, self.images = network, images.clone().requires_grad_(needs_gradient)
        self.logits = network(self.images).detach()
        self.grad_logits = torch.zeros_like(self.logits) if needs_gradient else None
        self.grad_images = torch.zeros_like(images) if needs_gradient else None
        RecordingOnCpu.made.append(self)

    def forward(self):
        with torch.set_grad_enabled(self.grad_logits is not None):
            result = self.network(self.images)
        RecordingOnCpu.stands = self, result
        self.logits.copy_(result.detach())

    def backward(self):
        whose, result = RecordingOnCpu.stands
        # As on a GPU: without a word the gradient of whatever stands in the pool.
        (gradient,) = torch.autograd.grad(result, whose.images, self.grad_logits[: len(result)], retain_graph=True)
        self.grad_images[: len(gradient)].copy_(gradient)


@pytest.fixture(params=[lr_resnet26, resnet26], ids=["lr_resnet26", "resnet26"])
def network(request, seeded, monkeypatch):
    monkeypatch.setattr(RecordingOnCpu, "made", [])
    network = request.param(5).eval()
    # Residual branches start at zero.
    for name, parameter in network.named_parameters():
        if name.endswith("expand.1.weight"):
            torch.nn.init.uniform_(parameter, 0.5, 1)
    return fold_constants(network)


@pytest.fixture
def recorded(network):
    return ReplayedNetwork(network, RecordingOnCpu)


@pytest.fixture
def images():
    return torch.rand(2, 3, 32, 32)


def gradient(network, images):
    images = images.clone().requires_grad_()
    logits = network(images)
    return logits.detach(), torch.autograd.grad(logits.logsumexp(1).sum(), images)[0]


def both(recorded, network, images):
    """Logits and gradient of one beside those of the other."""
    return zip(gradient(recorded, images), gradient(network, images), strict=True)


def close(a, b):
    return torch.allclose(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max()))


def test_the_same_logits_and_gradients_in_filled_up_batches(network):
    recorded = ReplayedNetwork(network, RecordingOnCpu)
    for count in (3, 4, 5, 2):
        images = torch.rand(count, 3, 32, 32)
        for found, expected in both(recorded, network, images):
            assert found.shape == expected.shape and close(found, expected)
        with torch.no_grad():
            assert close(recorded(images), network(images))
    # 2, 4 and 8 images, with and without a gradient.
    assert sorted(len(made.images) for made in RecordingOnCpu.made) == [2, 2, 4, 4, 8, 8]


def test_passes_that_came_between_do_not_change_a_gradient(network):
    recorded = ReplayedNetwork(network, RecordingOnCpu)
    first, second = torch.rand(2, 3, 3, 32, 32).unbind()
    first.requires_grad_()
    logits = recorded(first)
    before = logits.detach().clone()
    gradient(recorded, second)
    with torch.no_grad():
        recorded(second)
    assert torch.equal(logits, before)
    (found,) = torch.autograd.grad(logits.logsumexp(1).sum(), first, retain_graph=True)
    expected = gradient(network, first.detach())[1]
    assert close(found, expected)
    # A second time, after the first has used up what stood there.
    assert close(torch.autograd.grad(logits.logsumexp(1).sum(), first)[0], expected)


def test_a_gradient_is_of_all_uses_of_the_images(network):
    recorded = ReplayedNetwork(network, RecordingOnCpu)
    images = torch.rand(2, 3, 32, 32).requires_grad_()

    def both(network):
        return torch.autograd.grad((network(images) * network(images.flip(3)).detach() + network(images)).sum(), images)[0]

    assert close(both(recorded), both(network))


@pytest.mark.parametrize(
    "case",
    ["too many", "too large", "float64", "training", "autocast", "rule"],
)
def test_computed_as_it_is_where_a_recording_would_not_hold(network, recorded, images, monkeypatch, case):
    if case == "too many":
        monkeypatch.setattr(replay, "BATCH_SIZES", (1,))
    if case == "too large":
        # Three images are filled up to four.
        images = torch.rand(3, 3, 32, 32)
        monkeypatch.setattr(replay, "MOST_PIXELS", 4 * 32 * 32 - 1)
    if case == "float64":
        recorded, images = recorded.double(), images.double()
        for module in recorded.modules():
            if hasattr(module, "backend"):
                module.backend = "reference"
    if case == "training":
        recorded.train()
    with torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"):
        if case == "rule":
            with gradients_by(recorded, GradientRule("constant_weights")) as layers:
                by_rule = gradient(recorded, images)[1]
                assert close(by_rule, gradient(network, images)[1])
            if not layers:
                return
            assert not close(by_rule, gradient(network, images)[1])
        else:
            gradient(recorded, images)
    assert RecordingOnCpu.made == []


def test_moved_weights_are_recorded_anew(recorded, images):
    gradient(recorded, images)
    recorded.to("cpu")
    gradient(recorded, images)
    assert len(RecordingOnCpu.made) == 2


def test_a_copy_has_weights_and_recordings_of_its_own(recorded, images):
    logits, _ = gradient(recorded, images)
    copied = copy.deepcopy(recorded)
    with torch.no_grad():
        copied.network.classifier.bias += 1
    assert close(gradient(copied, images)[0], logits + 1)
    assert close(gradient(recorded, images)[0], logits)


def test_what_cannot_be_recorded_runs_as_it_is_and_says_so_once(network, caplog):
    def refuse(*arguments):
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    recorded = ReplayedNetwork(network, refuse)
    images = torch.rand(2, 3, 32, 32)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            for found, expected in both(recorded, network, images):
                assert torch.equal(found, expected)
    (record,) = caplog.records
    assert "operation not permitted when stream is capturing" in record.getMessage()


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUBLAS_STATUS_ALLOC_FAILED"),
    ],
)
def test_where_memory_runs_out_recordings_are_given_up(network, error, caplog):
    tried = []

    def run_out(network, images, *arguments):
        tried.append(len(images))
        if len(images) > 2:
            raise error
        return RecordingOnCpu(network, images, *arguments)

    other, recorded = ReplayedNetwork(network, RecordingOnCpu), ReplayedNetwork(network, run_out)
    images = torch.rand(3, 3, 32, 32)
    gradient(other, images)
    for _ in range(2):
        for found, expected in both(recorded, network, images):
            assert torch.equal(found, expected)
    assert not other._recordings and not caplog.records
    # Not tried again, but for a batch that may fit.
    assert close(gradient(recorded, images[:2])[1], gradient(network, images[:2])[1])
    assert tried == [4, 2] and recorded._recordings
    assert close(gradient(other, images)[0], network(images))


def test_memory_that_runs_out_in_a_pass_itself_takes_that_of_recordings(network, recorded, images, monkeypatch):
    gradient(recorded, images)
    forward = type(network).forward
    calls = []

    def run_out(network, images):
        calls.append(bool(recorded._recordings))
        if calls[-1]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(network, images)

    monkeypatch.setattr(type(network), "forward", run_out)
    with torch.autocast("cpu", torch.bfloat16):
        recorded(images)
    assert calls == [True, False]
    monkeypatch.setattr(
        type(network), "forward", lambda network, images: (_ for _ in ()).throw(torch.OutOfMemoryError("again"))
    )
    with pytest.raises(torch.OutOfMemoryError, match="again"), torch.autocast("cpu", torch.bfloat16):
        recorded(images)


@pytest.mark.parametrize("what", ["logits", "gradient"])
def test_a_recording_that_does_other_than_the_network_is_not_used(network, what, caplog):
    class Wrong(RecordingOnCpu):
        def forward(self):
            super().forward()
            if what == "logits":
                self.logits *= 1.01

        def backward(self):
            super().backward()
            if what == "gradient":
                self.grad_images[-1] = 0

    recorded = ReplayedNetwork(network, Wrong)
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(gradient(recorded, images)[1], gradient(network, images)[1])
    assert "gives other numbers" in caplog.text and recorded._gave_up


def test_several_gradients_of_one_pass(network, recorded, images, monkeypatch):
    passes = []
    forward = RecordingOnCpu.forward
    monkeypatch.setattr(RecordingOnCpu, "forward", lambda recording: passes.append(1) or forward(recording))
    gradient(recorded, images)
    passes.clear()

    def gradients(network):
        attacked = images.clone().requires_grad_()
        logits = network(attacked)
        return [torch.autograd.grad(logits[:, k].sum(), attacked, retain_graph=True)[0] for k in range(3)]

    for found, expected in zip(gradients(recorded), gradients(network), strict=True):
        assert close(found, expected)
    assert len(passes) == 1


def test_another_backend_is_recorded_anew(network, recorded, images):
    gradient(recorded, images)
    layers = [module for module in network.modules() if hasattr(module, "backend")]
    for layer in layers:
        layer.backend = "reference"
    gradient(recorded, images)
    assert len(RecordingOnCpu.made) == (2 if layers else 1)


def test_only_networks_of_ours_on_a_gpu(network):
    assert replayed(network) is network
    assert replayed(torch.nn.Linear(1, 1)).__class__ is torch.nn.Linear


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
# torch says so wherever the first thing of a backward pass is a product of matrices.
@pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS")
def test_on_a_gpu(network):
    network = network.cuda()
    recorded = replayed(network)
    assert isinstance(recorded, ReplayedNetwork)
    kept = []
    with deterministic_float32():
        for count in (3, 8, 5, 64, 3):
            images = torch.rand(count, 3, 64, 64, device="cuda")
            for found, expected in both(recorded, network, images):
                assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
            with torch.inference_mode():
                assert (recorded(images) - network(images)).abs().max() < 1e-4 * network(images).abs().max()
            images.requires_grad_()
            kept.append((images, recorded(images)))
            several = [torch.autograd.grad(kept[-1][1][:, k].sum(), images, retain_graph=True)[0] for k in (0, 1, 0)]
            assert torch.equal(several[0], several[2]) and not torch.equal(several[0], several[1])
        assert not recorded._gave_up and len(recorded._recordings) == 6
        for images, logits in kept:
            (found,) = torch.autograd.grad(logits.logsumexp(1).sum(), images)
            expected = gradient(network, images.detach())[1]
            assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


class Refusing(torch.nn.Module):
    """Waits for the device in the middle of a pass, which cannot be recorded."""

    def forward(self, images):
        return images.mean((2, 3)) * (images.sum().item() * 0 + 1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS")
def test_a_gpu_is_as_it_was_after_a_recording_that_failed(network):
    stream = torch.cuda.current_stream()
    images = torch.rand(2, 3, 32, 32, device="cuda")
    refusing = ReplayedNetwork(Refusing().cuda().eval())
    assert torch.allclose(refusing(images), images.mean((2, 3))) and refusing._gave_up
    assert torch.cuda.current_stream() == stream
    assert torch.rand(3, device="cuda").isfinite().all()
    recorded = replayed(network.cuda())
    gradient(recorded, images)
    assert recorded._recordings
