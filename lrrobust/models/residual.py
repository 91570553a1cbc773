"""The residual skeleton that LR-Nets and their convolutional controls share.

The two families differ in one thing only, the layer that mixes positions; everything else is this file,
so a difference in robustness cannot come from anywhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

#: (channels, stride) -> a layer (N, channels, H, W) -> (N, channels, ceil(H/stride), ceil(W/stride)).
SpatialLayer = Callable[[int, int], nn.Module]

#: How a network begins. "imagenet" is the published stem; "small" is for images of about 64 pixels, of which the
#: published one leaves 16 x 16 positions to the first stage and 2 x 2 to the last.
Stem = Literal["imagenet", "small"]
DEFAULT_STEM: Stem = "imagenet"

#: Side of the window and stride of the layer that mixes positions in each stem. All else is the same, the max pool
#: of stride 2 after it included: the first stage works at a quarter of the image's resolution in "imagenet" and at
#: half of it in "small", which costs about four times the arithmetic. A local relation layer has as many
#: parameters for any window, so LR-Nets keep their count; ResNets have 64 * 3 * (7**2 - 3**2) = 7680 fewer.
STEMS: Mapping[Stem, tuple[int, int]] = {"imagenet": (7, 2), "small": (3, 1)}

#: Channels that leave the four stages.
STAGE_OUTPUTS = (256, 512, 1024, 2048)

#: Statistics of the ImageNet training images, per colour, in pixel units of [0, 1].
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Normalization(nn.Module):
    """Takes images in [0, 1] to the scale a network was made for, (x - mean) / std per colour.

    It is part of every model, so that attacks and distances always live in pixel units.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return (images - self.mean) / self.std


class PointwiseConvolution(nn.Conv2d):
    """A 1x1 convolution without bias, computed as one matrix product over channels-last pixels.

    The same numbers as `nn.Conv2d` up to rounding. On the CPU the library's convolution is up to six
    times slower than its matrix product on the small maps of the last stages.
    """

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__(inputs, outputs, 1, stride=stride, bias=False)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        step_y, step_x = self.stride
        if (step_y, step_x) != (1, 1):
            features = features[:, :, ::step_y, ::step_x]
        batch, channels, height, width = features.shape
        # Copied where the stride left gaps: a product of matrices with gaps takes a slow path.
        pixels = features.permute(0, 2, 3, 1).reshape(-1, channels)
        products = F.linear(pixels, self.weight.flatten(1), self.bias)
        return products.view(batch, height, width, self.out_channels).permute(0, 3, 1, 2)


class Bottleneck(nn.Module):
    """1x1 convolution, spatial layer (which carries the stride), 1x1 convolution, around a shortcut."""

    def __init__(self, inputs: int, width: int, outputs: int, stride: int, spatial_layer: SpatialLayer) -> None:
        super().__init__()
        self.reduce = nn.Sequential(PointwiseConvolution(inputs, width), nn.BatchNorm2d(width), nn.ReLU(inplace=True))
        self.mix = nn.Sequential(spatial_layer(width, stride), nn.BatchNorm2d(width), nn.ReLU(inplace=True))
        self.expand = nn.Sequential(PointwiseConvolution(width, outputs), nn.BatchNorm2d(outputs))
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(PointwiseConvolution(inputs, outputs, stride), nn.BatchNorm2d(outputs))
        self.activation = nn.ReLU(inplace=True)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.activation(self.expand(self.mix(self.reduce(features))) + self.shortcut(features))


class ResidualNetwork(nn.Module):
    """Images (N, 3, H, W) in [0, 1] to logits (N, num_classes).

    Args:
        stem: images to features with `stem_outputs` channels, at the resolution of the first stage.
        widths: channels inside the bottlenecks of the four stages.
        blocks: bottlenecks in the four stages.
        spatial_layer: builds the layer that mixes positions.

    Source: He et al., Deep Residual Learning, CVPR 2016, section 4; the stride sits in the spatial layer.
    """

    def __init__(
        self,
        *,
        stem: nn.Module,
        stem_outputs: int,
        widths: Sequence[int],
        blocks: Sequence[int],
        spatial_layer: SpatialLayer,
        num_classes: int,
    ) -> None:
        super().__init__()
        self.normalization = Normalization(IMAGENET_MEAN, IMAGENET_STD)
        self.stem = stem
        stages = []
        inputs = stem_outputs
        for stage, (width, outputs, depth) in enumerate(zip(widths, STAGE_OUTPUTS, blocks, strict=True)):
            layers = []
            for block in range(depth):
                stride = 2 if stage > 0 and block == 0 else 1
                layers.append(Bottleneck(inputs, width, outputs, stride, spatial_layer))
                inputs = outputs
            stages.append(nn.Sequential(*layers))
        self.stages = nn.Sequential(*stages)
        self.classifier = nn.Linear(inputs, num_classes)
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        for module in self.modules():
            if isinstance(module, Bottleneck):
                # Residual branches start at zero: without it LR-Nets stay at chance for hundreds of steps.
                nn.init.zeros_(module.expand[1].weight)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.stages(self.stem(self.normalization(images)))
        return self.classifier(features.mean(dim=(2, 3)))
