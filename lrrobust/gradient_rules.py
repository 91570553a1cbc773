"""Gradients of another, smoother function than the one a layer computes: the seam between attacks and models.

A softmax that saturates hides from gradient attacks what the network reacts to. An attacker who knows the
network differentiates a smoother one instead, while the forward pass stays exactly as it is (backward pass
differentiable approximation; Athalye et al., Obfuscated Gradients Give a False Sense of Security, 2018, section
4.1). What is smoother only the layer knows, what needs it only the attack: a layer that can do so has an attribute
`gradient_rule`, None as long as its own gradient is wanted.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import nn

#: What the gradient is taken of, at the inputs of the forward pass:
#: exact                the layer itself;
#: tempered             the layer with its attention scores divided by a temperature;
#: absolute_difference  the layer with -|q - k| for -(q - k)^2: near as smooth as far, its slope is bounded;
#: constant_weights     the layer with its attention weights held constant: only the values it sums are varied.
GradientOf = Literal["exact", "tempered", "absolute_difference", "constant_weights"]


@dataclass(frozen=True)
class GradientRule:
    """What a layer's gradient is taken of; `temperature` is that of "tempered", and more than 0."""

    gradient_of: GradientOf
    temperature: float = 1.0


@contextmanager
def gradients_by(model: nn.Module, rule: GradientRule) -> Iterator[int]:
    """Layers of the model that can take their gradient by a rule do so inside; how many these are.

    Logits stay the same, bit by bit. With 0 layers the gradient is the model's own, as it is for convolutional
    networks. Afterwards, also after an exception, every layer has the rule that it had.
    """
    layers = [module for module in model.modules() if hasattr(module, "gradient_rule")]
    before = [layer.gradient_rule for layer in layers]
    try:
        for layer in layers:
            layer.gradient_rule = None if rule.gradient_of == "exact" else rule
        yield len(layers)
    finally:
        for layer, own in zip(layers, before, strict=True):
            layer.gradient_rule = own
