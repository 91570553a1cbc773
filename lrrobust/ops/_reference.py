"""The local relation in plain torch: the definition every other backend is compared with.

Written to be read. It materialises every window, so it needs k*k times the memory of its inputs; it is
never optimised, works on any device and floating dtype, and can be differentiated any number of times.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def similarity_scores(query: torch.Tensor, key: torch.Tensor, similarity: str) -> torch.Tensor:
    """Appearance composability phi(q, k) of broadcastable tensors (paper, section 3.2)."""
    if similarity == "squared_difference":
        return -((query - key) ** 2)
    if similarity == "absolute_difference":
        return -(query - key).abs()
    return query * key


def local_relation_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    geometry: torch.Tensor,
    *,
    stride: int,
    dilation: int,
    similarity: str,
    channels_per_group: int,
) -> torch.Tensor:
    """Same arguments and result as `local_relation`, which checks them first."""
    batch, groups, out_height, out_width = query.shape
    channels = value.shape[1]
    kernel_size = geometry.shape[-1]
    taps = kernel_size**2

    def windows(images: torch.Tensor) -> torch.Tensor:
        """(N, D, H, W) -> (N, D, taps, Ho*Wo), zero outside the image."""
        padding = dilation * (kernel_size - 1) // 2
        columns = F.unfold(images, kernel_size, dilation=dilation, padding=padding, stride=stride)
        return columns.view(images.shape[0], images.shape[1], taps, out_height * out_width)

    is_inside = windows(torch.ones_like(key[:1, :1])) > 0
    scores = similarity_scores(query.flatten(2).unsqueeze(2), windows(key), similarity)
    scores = scores + geometry.reshape(1, groups, taps, 1)
    weights = scores.masked_fill(~is_inside, float("-inf")).softmax(dim=2)
    channel_weights = weights.repeat_interleave(channels_per_group, dim=1)[:, :channels]
    out = (channel_weights * windows(value)).sum(dim=2).view(batch, channels, out_height, out_width)
    return out.to(value.dtype)  # of mixed inputs torch makes the widest
