"""Whether a model is still the one that the evaluation began with."""

from __future__ import annotations

import torch
from torch import nn

from lrrobust.errors import ModelError
from lrrobust.evaluation.judge import call_model, gap, logit_scale

_WHOLE_NUMBERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Constancy:
    """Remembers a model's state and its logits of a few images; `check` compares.

    Args:
        model: in evaluation mode, on its device.
        images: (N, 3, H, W) in [0, 1] on the same device; the fewer, the cheaper a check.
        tolerance: two forwards of a model that has not changed differ by no more than this share of `logit_scale`.
    """

    def __init__(self, model: nn.Module, images: torch.Tensor, tolerance: float) -> None:
        self._model = model
        self._images = images.clone()
        self._tolerance = tolerance
        self._logits = self._predict()
        self._scale = logit_scale(self._logits)
        # After a forward: some models fill caches in their first.
        self._state = {name: _bits(value).clone() for name, value in _state(model).items()}

    def check(self) -> None:
        """Raises ModelError when parameters, buffers or predictions are others than at the beginning."""
        now = _state(self._model)
        for name, before in self._state.items():
            if name not in now or not torch.equal(_bits(now[name]), before):
                raise ModelError(
                    f"the model changes while it is evaluated: {name!r} is not what it was at the beginning; "
                    "results of several models cannot be mixed, so the last was not stored; write nothing to "
                    "parameters and buffers inside forward"
                )
        difference = gap(self._predict(), self._logits)
        # Written so that NaN counts as a change.
        if not difference <= self._tolerance * self._scale:
            raise ModelError(
                f"the model changes while it is evaluated: its logits of the same images differ by {difference:.2g} from "
                "those at the beginning; results of several models cannot be mixed, so the last was not stored; let "
                "forward depend on nothing but images and weights"
            )

    @torch.no_grad()
    def _predict(self) -> torch.Tensor:
        return call_model(self._model, self._images.clone())


def _state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: value
        for name, value in model.state_dict().items()
        if isinstance(value, torch.Tensor) and value.layout == torch.strided
    }


def _bits(value: torch.Tensor) -> torch.Tensor:
    """As whole numbers, in which NaN equals itself."""
    # Those of torch's quantised types come as integers; seen as another type in place they are memory out of bounds.
    value = value.detach().int_repr() if value.is_quantized else value.detach()
    # In the order in which they lie: the check is made at every part, and reordering channels takes longer than comparing.
    flat = value.permute(sorted(range(value.ndim), key=value.stride, reverse=True)).contiguous().view(-1)
    return flat.view(_WHOLE_NUMBERS[value.element_size()]) if value.element_size() in _WHOLE_NUMBERS else flat.view(torch.uint8)
