"""Intermediate results computed again in the backward pass, where keeping them costs more than computing them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch


class _Saved:
    """What autograd keeps in place of a tensor: the tensor, or which of the results it is a view of, and how."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor: torch.Tensor | None = tensor
        self.view: tuple[int, torch.Size, tuple[int, ...], int] | None = None

    def forget(self, storages: Sequence[int]) -> bool:
        """Lets go of the tensor if its memory is that of one of the results; whether it was."""
        assert self.tensor is not None
        storage = self.tensor.untyped_storage().data_ptr()
        if storage not in storages:
            return False
        self.view = storages.index(storage), self.tensor.shape, self.tensor.stride(), self.tensor.storage_offset()
        self.tensor = None
        return True


def recompute_in_backward(
    first: Callable[[torch.Tensor], tuple[torch.Tensor, ...]],
    then: Callable[..., torch.Tensor],
    features: torch.Tensor,
) -> torch.Tensor:
    """`then(*first(features))`, bit by bit, whose backward pass calls `first` again rather than keep its results.

    Unlike `torch.utils.checkpoint` it can be wrapped around layers whose expensive last operation saves what the
    cheap ones before it have computed, without a second run of the expensive one.

    Args:
        first: cheap, without side effects and deterministic, of tensors that stay as they are until the backward pass
            (batch normalisation in training mode is not). What is saved within it beside its results is kept.
        then: may use the results as it likes, but not change them in place.
        features: what `first` starts from; it is kept.
    """
    if not torch.is_grad_enabled():
        return then(*first(features))
    saved: list[_Saved] = []
    device = features.device.type
    autocast = {"dtype": torch.get_autocast_dtype(device), "enabled": torch.is_autocast_enabled(device)}
    start = features.detach()
    recomputed: list[torch.Tensor] = []
    waiting = 0

    def pack(tensor: torch.Tensor) -> _Saved:
        saved.append(_Saved(tensor))
        return saved[-1]

    def unpack(kept: _Saved) -> torch.Tensor:
        nonlocal waiting
        if kept.tensor is not None:
            return kept.tensor
        if not recomputed:
            # Inside a backward pass, which may have another autocast, and under saved-tensor hooks of its own.
            with torch.no_grad(), torch.autocast(device, **autocast):
                recomputed.extend(first(start))
            waiting = forgotten
        assert kept.view is not None
        which, *layout = kept.view
        tensor = recomputed[which].as_strided(*layout)
        waiting -= 1
        if waiting == 0:
            recomputed.clear()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        results = first(features)
        output = then(*results)
    storages = [result.untyped_storage().data_ptr() for result in results]
    forgotten = sum(kept.forget(storages) for kept in saved)
    saved.clear()
    return output
