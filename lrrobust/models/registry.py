"""Names to networks, and models ready to be evaluated."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn

from lrrobust.errors import UnknownNameError
from lrrobust.models import lrnet, resnet

#: Our own networks: name -> builder(num_classes).
NETWORKS: Mapping[str, Callable[[int], nn.Module]] = {
    "lr_resnet26": lrnet.lr_resnet26,
    "lr_resnet50": lrnet.lr_resnet50,
    "lr_resnet101": lrnet.lr_resnet101,
    "resnet26": resnet.resnet26,
    "resnet50": resnet.resnet50,
    "resnet101": resnet.resnet101,
}


def build_network(name: str, num_classes: int) -> nn.Module:
    """One of our networks with fresh weights; UnknownNameError names the nearest."""
    if name not in NETWORKS:
        raise UnknownNameError("network", name, NETWORKS)
    return NETWORKS[name](num_classes)
