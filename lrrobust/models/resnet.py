"""ResNets with bottlenecks, the convolutional controls of the LR-Nets.

Source: He et al., Deep Residual Learning, CVPR 2016, table 1, with the stride in the 3x3 convolution.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from lrrobust.models.residual import DEFAULT_STEM, STEMS, ResidualNetwork, Stem

BOTTLENECK_WIDTHS = (64, 128, 256, 512)


def _convolve_3x3(channels: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, 3, stride=stride, padding=1, bias=False)


def _build(blocks: Sequence[int], num_classes: int, stem: Stem) -> ResidualNetwork:
    window, stride = STEMS[stem]
    layers = nn.Sequential(
        nn.Conv2d(3, 64, window, stride=stride, padding=window // 2, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, stride=2, padding=1),
    )
    return ResidualNetwork(
        stem=layers,
        stem_outputs=64,
        widths=BOTTLENECK_WIDTHS,
        blocks=blocks,
        spatial_layer=_convolve_3x3,
        num_classes=num_classes,
    )


def resnet26(num_classes: int = 1000, stem: Stem = DEFAULT_STEM) -> ResidualNetwork:
    """ResNet-26: 16.0 M parameters at 1000 classes."""
    return _build((2, 2, 2, 2), num_classes, stem)


def resnet50(num_classes: int = 1000, stem: Stem = DEFAULT_STEM) -> ResidualNetwork:
    """ResNet-50: 25.6 M parameters at 1000 classes."""
    return _build((3, 4, 6, 3), num_classes, stem)


def resnet101(num_classes: int = 1000, stem: Stem = DEFAULT_STEM) -> ResidualNetwork:
    """ResNet-101: 44.5 M parameters at 1000 classes."""
    return _build((3, 4, 23, 3), num_classes, stem)
