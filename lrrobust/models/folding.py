"""What is constant while a network of ours is evaluated, computed once."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from lrrobust.models.lrnet import GeometryPrior, LocalRelationLayer
from lrrobust.models.recomputation import recompute_in_backward
from lrrobust.models.residual import ResidualNetwork

#: One image of 224 x 224, 16 of 64 x 64: maps of 64 channels take up to 17 MB.
_PIXELS_AT_ONCE = 2**16


class ConstantGeometry(nn.Module):
    """The scores (groups, k, k) that a geometry network gives, without the network."""

    def __init__(self, prior: GeometryPrior) -> None:
        super().__init__()
        self.register_buffer("scores", prior().detach())

    def forward(self) -> torch.Tensor:
        return self.scores


class RecomputedStem(nn.Sequential):
    """Layers that begin with pointwise ones and a local relation layer; results of the pointwise ones are not kept.

    In the stem these have 64 channels, and as many again for queries and keys at a quarter of it, at the full
    resolution of the image: a quarter of what a gradient step would keep. They come from 3 channels at little cost.

    On the CPU a few images go through at a time: the maps of a whole batch would be by far the largest of the network, and
    the holes that they leave in the C library's heap, which holds tensors aligned, are filled badly.
    """

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        count = max(1, _PIXELS_AT_ONCE // (images.shape[-2] * images.shape[-1]))
        if images.device.type != "cpu" or len(images) <= count:
            return self._forward(images)
        return torch.cat([self._forward(part) for part in images.split(count)])

    def _forward(self, images: torch.Tensor) -> torch.Tensor:
        layers = list(self)
        at = next(i for i, layer in enumerate(layers) if isinstance(layer, LocalRelationLayer))
        relation = layers[at]

        def compute_features(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            features = images
            for layer in layers[:at]:
                features = layer(features)
            return relation.query_key(features), features

        features = recompute_in_backward(compute_features, relation.aggregate, images)
        for layer in layers[at + 1 :]:
            features = layer(features)
        return features


def fold_constants(network: nn.Module) -> nn.Module:
    """The same function up to rounding, cheaper: an attack takes thousands of gradients of unchanging weights.

    Batch normalisation, an affine map once its statistics are fixed, goes into the convolution before it,
    and geometry networks become their values. The beginning of an LR-Net is computed again in the backward pass:
    with constant weights that is exact, and it saves memory. Networks of other people are returned as they are: how theirs
    are built, and what they do in evaluation mode, is not known here.

    Args:
        network: in evaluation mode. It is not changed.

    Returns:
        a copy in evaluation mode whose weights cannot be trained further.
    """
    if not isinstance(network, ResidualNetwork):
        return network
    folded = copy.deepcopy(network).eval().requires_grad_(False)
    for module in list(folded.modules()):
        if isinstance(module, nn.Sequential):
            _fold_batch_norms(module)
        if isinstance(module, LocalRelationLayer):
            module.geometry = ConstantGeometry(module.geometry)
        if isinstance(module, nn.ReLU):
            # In place it would now change a view of a matrix product, for which autograd copies gradients twice.
            module.inplace = False
    if any(isinstance(layer, LocalRelationLayer) for layer in folded.stem):
        folded.stem = RecomputedStem(*folded.stem)
    return folded.to(memory_format=torch.channels_last)


def _fold_batch_norms(layers: nn.Sequential) -> None:
    for i in range(1, len(layers)):
        norm, before = layers[i], layers[i - 1]
        if not isinstance(norm, nn.BatchNorm2d):
            continue
        if isinstance(before, LocalRelationLayer):
            before.output = fuse_conv_bn_eval(before.output, norm)
        elif isinstance(before, nn.Conv2d):
            layers[i - 1] = fuse_conv_bn_eval(before, norm)
        else:
            continue
        layers[i] = nn.Identity()
