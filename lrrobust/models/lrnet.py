"""Local Relation Networks: residual networks whose k > 1 convolutions are local relation layers.

Source: Hu et al., Local Relation Networks for Image Recognition, ICCV 2019, sections 3 and 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import nn

from lrrobust.gradient_rules import GradientRule
from lrrobust.models.residual import DEFAULT_STEM, STEMS, PointwiseConvolution, ResidualNetwork, Stem
from lrrobust.ops import local_relation
from lrrobust.ops.local_relation import PAPER_CHANNELS_PER_GROUP, Backend, Similarity
from lrrobust.ops.surrogate_gradient import local_relation_with_gradient

#: Side of the window in all of the paper's networks.
PAPER_KERNEL_SIZE = 7

#: Hidden units of the geometry network.
GEOMETRY_HIDDEN = 16

#: Chosen by the paper so that multiply-adds match those of ResNet.
BOTTLENECK_WIDTHS = (100, 200, 400, 800)


class GeometryPrior(nn.Module):
    """g of the paper: a network on the relative position, evaluated on the fixed k x k grid of offsets.

    Offsets (dy, dx) are scaled to [-1, 1]. Returns (groups, k, k).
    """

    def __init__(self, groups: int, kernel_size: int) -> None:
        super().__init__()
        self.kernel_size = kernel_size
        radius = (kernel_size - 1) // 2
        steps = torch.arange(-radius, radius + 1) / max(radius, 1)
        offsets = torch.stack(torch.meshgrid(steps, steps, indexing="ij"), dim=-1)
        self.register_buffer("offsets", offsets.view(-1, 2), persistent=False)
        self.hidden = nn.Linear(2, GEOMETRY_HIDDEN)
        self.output = nn.Linear(GEOMETRY_HIDDEN, groups)

    def forward(self) -> torch.Tensor:
        # float32 even under autocast: 49 points cost nothing and the prior enters every score.
        with torch.autocast(self.offsets.device.type, enabled=False):
            scores = self.output(torch.relu(self.hidden(self.offsets)))
        return scores.t().reshape(-1, self.kernel_size, self.kernel_size)


class LocalRelationLayer(nn.Module):
    """(N, C, H, W) -> (N, C, ceil(H/stride), ceil(W/stride)): aggregate by local relation, then mix channels.

    Query and key come from one 1x1 convolution; the query is read at the output positions only.

    Attributes:
        gradient_rule: what the gradient is taken of, where it is not of the layer itself; see
            `lrrobust.gradient_rules`.
    """

    gradient_rule: GradientRule | None = None

    def __init__(
        self,
        channels: int,
        stride: int = 1,
        *,
        kernel_size: int = PAPER_KERNEL_SIZE,
        similarity: Similarity = "squared_difference",
        channels_per_group: int = PAPER_CHANNELS_PER_GROUP,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        self.stride = stride
        self.kernel_size = kernel_size
        self.similarity: Similarity = similarity
        self.channels_per_group = channels_per_group
        self.backend: Backend = backend
        self.groups = -(-channels // channels_per_group)
        self.query_key = nn.Sequential(PointwiseConvolution(channels, 2 * self.groups), nn.BatchNorm2d(2 * self.groups))
        self.geometry = GeometryPrior(self.groups, kernel_size)
        self.output = PointwiseConvolution(channels, channels)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.aggregate(self.query_key(features), features)

    def aggregate(self, query_key: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """The layer from its queries and keys (N, 2 * groups, H, W) on."""
        query, key = query_key.split(self.groups, dim=1)
        rule = self.gradient_rule
        relate = local_relation if rule is None else partial(local_relation_with_gradient, rule)
        aggregated = relate(
            query[:, :, :: self.stride, :: self.stride],
            key,
            features,
            self.geometry(),
            kernel_size=self.kernel_size,
            stride=self.stride,
            similarity=self.similarity,
            channels_per_group=self.channels_per_group,
            backend=self.backend,
        )
        return self.output(aggregated)

    def extra_repr(self) -> str:
        # Its parameters do not show the window. The paper's own goes without saying: descriptions of networks
        # identify runs, also those of before there was another window.
        return "" if self.kernel_size == PAPER_KERNEL_SIZE else f"kernel_size={self.kernel_size}"


def _build(blocks: Sequence[int], num_classes: int, stem: Stem) -> ResidualNetwork:
    window, stride = STEMS[stem]
    layers = nn.Sequential(
        PointwiseConvolution(3, 64),
        nn.BatchNorm2d(64),
        nn.ReLU(inplace=True),
        LocalRelationLayer(64, stride, kernel_size=window),
        nn.BatchNorm2d(64),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, stride=2, padding=1),
    )
    return ResidualNetwork(
        stem=layers,
        stem_outputs=64,
        widths=BOTTLENECK_WIDTHS,
        blocks=blocks,
        spatial_layer=LocalRelationLayer,
        num_classes=num_classes,
    )


def lr_resnet26(num_classes: int = 1000, stem: Stem = DEFAULT_STEM) -> ResidualNetwork:
    """LR-Net-26: 14.6 M parameters at 1000 classes."""
    return _build((2, 2, 2, 2), num_classes, stem)


def lr_resnet50(num_classes: int = 1000, stem: Stem = DEFAULT_STEM) -> ResidualNetwork:
    """LR-Net-50: 23.4 M parameters at 1000 classes."""
    return _build((3, 4, 6, 3), num_classes, stem)


def lr_resnet101(num_classes: int = 1000, stem: Stem = DEFAULT_STEM) -> ResidualNetwork:
    """LR-Net-101: 40.8 M parameters at 1000 classes."""
    return _build((3, 4, 23, 3), num_classes, stem)
