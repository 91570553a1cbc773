"""MixUp and CutMix: images of a batch blended in pairs, their labels with them.

Sources: Zhang et al., mixup: Beyond Empirical Risk Minimization, ICLR 2018; Yun et al., CutMix: Regularization
Strategy to Train Strong Classifiers with Localizable Features, ICCV 2019, algorithm A1.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError
from scipy.special import betaincinv

from lrrobust.config_file import Settings


class MixingSpec(Settings):
    """How images are mixed; where both ways are on, each takes half of the images that are."""

    #: The image's own share is drawn from Beta(alpha, alpha); 0 switches this way off.
    mixup_alpha: float = Field(ge=0)
    cutmix_alpha: float = Field(ge=0)
    #: Of the images, how many are mixed at all.
    share: float = Field(gt=0, le=1)

    @model_validator(mode="after")
    def _check_something_is_on(self) -> MixingSpec:
        if not (self.mixup_alpha or self.cutmix_alpha):
            raise PydanticCustomError("mixing", "expected mixup_alpha or cutmix_alpha above 0; leave mixing out for none")
        return self


def draw_mixing(count: int, spec: MixingSpec, generator: torch.Generator) -> torch.Tensor:
    """For each image its own share, whether it is cut (0 or 1), and the box's centre in [0, 1]: float32 (count, 4)."""
    is_mixed, is_cut, quantile, x, y = torch.rand(5, count, generator=generator)
    cut = is_cut < (0.5 if spec.mixup_alpha and spec.cutmix_alpha else float(spec.cutmix_alpha > 0))
    own = torch.ones(count)
    for alpha, rows in ((spec.cutmix_alpha, cut), (spec.mixup_alpha, ~cut)):
        if alpha:
            # By the inverse of the distribution function: torch's own beta numbers take no generator.
            own[rows] = torch.from_numpy(betaincinv(alpha, alpha, quantile[rows].double().numpy())).float()
    own = torch.where(is_mixed < spec.share, own, 1.0)
    return torch.stack([own, cut.float(), x, y], 1)


def mix(images: torch.Tensor, labels: torch.Tensor, num_classes: int, drawn: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mixes every image with its neighbour: the first with the second, the third with the fourth, and so on.

    The order of a batch is random, so neighbours are random partners; and both of a pair are in the same process
    when a batch is spread over several. Of an odd number the last image stays as it is.

    Args:
        images: float (N, 3, H, W).
        labels: int64 (N,).
        drawn: of `draw_mixing`, on the CPU.

    Returns:
        images (N, 3, H, W), and the share of each class (N, num_classes), which sums to 1.
    """
    height, width = images.shape[2:]
    own, cut, x, y = drawn.double().unbind(1)
    # CutMix: a box of the other's share of the area, cut off at the edges; the shares are those of what is left.
    side = (1 - own).sqrt() * cut
    left, right = (((x + sign * side / 2) * width).round().clamp(0, width) for sign in (-1, 1))
    top, bottom = (((y + sign * side / 2) * height).round().clamp(0, height) for sign in (-1, 1))
    # In one piece to the device: share of a blend, then the box.
    sent = torch.stack([torch.where(cut > 0, 1.0, own), left, right, top, bottom], 1).float()
    blend, left, right, top, bottom = sent.to(images.device, non_blocking=True).view(len(images), 5, 1, 1, 1).unbind(1)
    columns = torch.arange(width, device=images.device)
    rows = torch.arange(height, device=images.device).view(-1, 1)
    is_other = (columns >= left) & (columns < right) & (rows >= top) & (rows < bottom)
    weight = torch.where(is_other, 0.0, blend)
    partner = torch.arange(len(images), device=images.device) ^ 1
    partner = torch.where(partner < len(images), partner, partner ^ 1)
    mixed = torch.lerp(images[partner], images, weight)
    share = weight.mean((2, 3))
    one_hot = F.one_hot(labels, num_classes).float()
    return mixed, torch.lerp(one_hot[partner], one_hot, share)
