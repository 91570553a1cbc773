"""A model held still while it is attacked and judged."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


@contextmanager
def frozen(model: nn.Module) -> Iterator[nn.Module]:
    """The model in evaluation mode with parameters that take no gradient.

    Afterwards, also after an exception, every module's mode and every parameter's flag is as it was.
    """
    # A frozen TorchScript module has no mode.
    training = {module: module.training for module in model.modules() if hasattr(module, "training")}
    # One made in inference mode can have its flag taken, and never given back.
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad and not parameter.is_inference()]
    try:
        if model in training:
            try:
                model.eval()
            except NotImplementedError:
                # An exported program keeps the mode that it was exported in; its flags are always up and mean nothing.
                for module in training:
                    module.training = False
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield model
    finally:
        for module, was_training in training.items():
            module.training = was_training
        for parameter in trainable:
            parameter.requires_grad_(True)
