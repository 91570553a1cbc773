"""What attacks climb: losses of logits that rise as an image leaves its class, one number an image.

All take logits (n, K), K >= 2, of any sign and scale, and labels (n,) int64, and return float64 (n,). In
float64 confident float32 logits, whose softmax rounds to 0 and 1, still have a slope.
"""

from __future__ import annotations

import math

import torch

#: Floor of the scale that the DLR losses divide by: the top logits may tie.
_LEAST_SCALE = 1e-12


def margin(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The largest other logit minus the label's: positive exactly where the image is misclassified."""
    own = labels[:, None]
    logits = logits.double()
    # Masked, not multiplied by zero: all logits may be negative.
    others = logits.scatter(1, own, -math.inf).amax(1)
    return others - logits.gather(1, own).squeeze(1)


def lead_of(logits: torch.Tensor, classes: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The logit of one class minus that of another; classes and labels (n,) int64."""
    logits = logits.double()
    return (logits.gather(1, classes[:, None]) - logits.gather(1, labels[:, None])).squeeze(1)


def log_odds(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """log (1 - p_y) / p_y, with p the softmax: the cross-entropy on another scale.

    The cross-entropy is log(1 + exp(log odds)), so it orders iterates in the same way, and its gradient
    has the same direction, p_y times shorter in the units of 1 - p_y. But where p_y rounds to 1 the
    cross-entropy is flat, and this is not.
    """
    own = labels[:, None]
    logits = logits.double()
    others = logits.scatter(1, own, -math.inf).logsumexp(1)
    return others - logits.gather(1, own).squeeze(1)


def dlr(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Difference of logits ratio: the margin over the distance from the largest to the third largest logit.

    Unchanged when logits are scaled or shifted. Two classes have no third logit: there it is the margin.

    Source: Croce and Hein, Reliable Evaluation of Adversarial Robustness with an Ensemble of Diverse
    Parameter-free Attacks, 2020, section 4.1, equation 6.
    """
    if logits.shape[1] < 3:
        return margin(logits, labels)
    top = logits.double().topk(3, dim=1).values
    return margin(logits, labels) / (top[:, 0] - top[:, 2]).clamp_min(_LEAST_SCALE)


def targeted_dlr(logits: torch.Tensor, labels: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The target's logit minus the label's, over the distance from the largest logit to the mean of the
    third and fourth largest.

    Unchanged when logits are scaled or shifted. With fewer than four classes it is the mere difference:
    over the distance to the third largest it would be flat where that is the target.

    Args:
        targets: (n,) int64, classes other than the labels.

    Source: Croce and Hein, 2020, section 4.1, equation 7.
    """
    towards = lead_of(logits, targets, labels)
    if logits.shape[1] < 4:
        return towards
    top = logits.double().topk(4, dim=1).values
    return towards / (top[:, 0] - top[:, 2:].mean(1)).clamp_min(_LEAST_SCALE)


def likely_targets(logits: torch.Tensor, labels: torch.Tensor, count: int) -> torch.Tensor:
    """The `count` most likely classes other than the label, most likely first; int64 (n, min(count, K - 1))."""
    others = logits.scatter(1, labels[:, None], -math.inf)
    return others.topk(min(count, logits.shape[1] - 1), dim=1).indices
