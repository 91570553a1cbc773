import pytest
import torch

from lrrobust.models.residual import IMAGENET_MEAN, IMAGENET_STD
from lrrobust.models.resnet import resnet26, resnet50, resnet101
from lrrobust.torchvision_import import import_torchvision


def _torchvision_resnet(blocks, num_classes):
    import_torchvision()
    from torchvision.models.resnet import Bottleneck, ResNet

    return ResNet(Bottleneck, list(blocks), num_classes=num_classes)


@pytest.mark.parametrize(
    "build, millions, blocks",
    [(resnet26, 16.0, (2, 2, 2, 2)), (resnet50, 25.56, (3, 4, 6, 3)), (resnet101, 44.55, (3, 4, 23, 3))],
)
def test_parameters(build, millions, blocks):
    with torch.device("meta"):
        count = sum(p.numel() for p in build(1000).parameters())
        assert count == sum(p.numel() for p in _torchvision_resnet(blocks, 1000).parameters())
    assert count / 1e6 == pytest.approx(millions, rel=0.01)


def test_computes_what_torchvision_computes(seeded):
    theirs = _torchvision_resnet((2, 2, 2, 2), 10).eval()
    for tensor in theirs.state_dict().values():
        if tensor.ndim == 1:
            tensor.uniform_(0.5, 1.5)
    ours = resnet26(10).eval()
    # The same layers in the same order, under other names.
    ours.load_state_dict(dict(zip(ours.state_dict(), theirs.state_dict().values(), strict=True)))
    images = torch.rand(2, 3, 33, 47)
    mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_STD))
    with torch.inference_mode():
        logits, expected = ours(images), theirs((images - mean) / std)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
