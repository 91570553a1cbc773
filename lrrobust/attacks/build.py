"""From a spec to a callable attack. The only module that imports torchattacks."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import ModuleType

import torch
from torch import nn

from lrrobust.attacks.carlini_wagner import carlini_wagner_l2
from lrrobust.attacks.specs import AttackSpec, CwSpec, FgsmSpec, PgdSpec
from lrrobust.frozen import frozen
from lrrobust.torchvision_import import import_torchvision

_Run = Callable[[nn.Module, torch.Tensor, torch.Tensor], torch.Tensor]


def build_attack(spec: AttackSpec, eps: float | None) -> Attack:
    """Make the attack that `spec` describes, at one budget.

    Args:
        spec: a checked spec.
        eps: budget in pixel units of [0, 1], zero or more, for FGSM and PGD; None for Carlini and
            Wagner, which minimises the distance and knows no budget.

    Raises:
        ValueError: eps is given to an attack that takes none, or is missing, negative or not finite.
    """
    if isinstance(spec, CwSpec):
        if eps is not None:
            raise ValueError(f"{spec.name}: a minimal-norm attack runs once, without a budget, got {eps=}")
        return Attack(_carlini_wagner(spec))
    if eps is None or not 0 <= eps < float("inf"):
        raise ValueError(f"{spec.name}: expected a finite budget of zero or more, got {eps=}")
    if eps == 0:  # nothing may change, and torchattacks would divide by it
        return Attack(lambda model, images, labels: images)
    return Attack(_fgsm(eps) if isinstance(spec, FgsmSpec) else _pgd(spec, eps))


class Attack:
    """Proposes adversarial images; whether one is adversarial is for the caller to judge.

    Calling it takes the model, images (N, 3, H, W) in [0, 1], float32 or float64, and labels (N,),
    int64, on the model's device, and returns the proposals: same shape, dtype and device,
    contiguous and detached, the image itself where the attack has nothing to propose. They keep to
    box and budget up to float rounding, see `lrrobust.threat.TOLERANCE`.

    FGSM and PGD propose their last iterate, as torchattacks has it, though an earlier one may have
    been adversarial. They pass every iterate but the last through the model, always all N images in
    their order: a caller that watches the model's forwards misses none. Carlini and Wagner's attack
    returns its best iterate, and forwards fewer than N images once some are done.

    The model runs in evaluation mode, with frozen parameters; both are put back afterwards, also
    after an exception. Random starts draw from torch's global generator, which the caller seeds.

    Attributes:
        nonfinite_gradients: how often, over all calls, the gradient of an image had NaN or infinite
            components. It counts as zero there: the image stays where it is for that step, instead
            of turning into NaN. Anything but 0 says that the attack was not at full strength.
    """

    def __init__(self, run: _Run) -> None:
        self._run = run
        self.nonfinite_gradients = 0

    def __call__(self, model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        _check_inputs(images, labels)
        if len(images) == 0:
            return images.clone()
        # Attacks need gradients whatever the caller's mode; tensors of inference mode cannot take
        # part in them, but their clones can. torchattacks views images as rows: contiguous.
        with torch.inference_mode(False), torch.enable_grad(), frozen(model):
            images = images.detach().clone(memory_format=torch.contiguous_format)
            victim = _Victim(model, images.device, self._count_nonfinite)
            return self._run(victim, images, labels.clone()).detach().contiguous()

    def _count_nonfinite(self, count: int) -> None:
        self.nonfinite_gradients += count


class _Victim(nn.Module):
    """The model as the attacks see it.

    torchattacks asks for the device of the first parameter, of which a model may have none; switches
    between modes only the module it is given; and normalises images by itself if the class of that
    module is called "RobModel". All three end at this wrapper.
    """

    def __init__(self, model: nn.Module, device: torch.device, count_nonfinite: Callable[[int], None]) -> None:
        super().__init__()
        self.model = model
        self.on_device = nn.Parameter(torch.empty(0, device=device), requires_grad=False)
        self.count_nonfinite = count_nonfinite
        self.eval()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if images.requires_grad:
            images.register_hook(self._mend_gradient)
        return self.model(images)

    def _mend_gradient(self, gradient: torch.Tensor) -> torch.Tensor:
        """Rows with NaN or infinity become zero; contiguous, also when the model is channels_last."""
        is_finite = gradient.isfinite().flatten(1).all(1)
        self.count_nonfinite(int((~is_finite).sum()))
        return gradient.where(is_finite[:, None, None, None], 0).contiguous()


def _fgsm(eps: float) -> _Run:
    return lambda model, images, labels: _torchattacks().FGSM(model, eps=eps)(images, labels)


def _pgd(spec: PgdSpec, eps: float) -> _Run:
    settings = {
        "eps": eps,
        "alpha": spec.step_size_ratio * eps / spec.steps,
        "steps": spec.steps,
        "random_start": spec.random_start,
    }

    def run_once(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        # A new attack object each time: they carry state from call to call.
        if spec.norm == "linf":
            return _torchattacks().PGD(model, **settings)(images, labels)
        # Starts in a uniformly random direction, at a uniformly random share of eps: denser towards
        # the image than the ball's uniform distribution. Gradients are divided by their norm plus a
        # constant; its default of 1e-10 stops the attack on confident models, whose gradients are
        # tiny long before they are zero.
        return _torchattacks().PGDL2(model, eps_for_division=1e-20, **settings)(images, labels)

    def run(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        proposals = run_once(model, images, labels)
        for _ in range(spec.restarts - 1):
            # Images already broken are attacked again, so that every forward holds all N in order.
            is_broken = _is_misclassified(model, proposals, labels)
            again = run_once(model, images, labels)
            proposals = torch.where(is_broken[:, None, None, None], proposals, again)
        return proposals

    return run


def _carlini_wagner(spec: CwSpec) -> _Run:
    return lambda model, images, labels: carlini_wagner_l2(
        model,
        images,
        labels,
        binary_search_steps=spec.binary_search_steps,
        steps=spec.steps,
        lr=spec.lr,
        initial_c=spec.initial_c,
        confidence=spec.confidence,
        abort_early=spec.abort_early,
    )


@cache
def _torchattacks() -> ModuleType:
    import_torchvision()
    import torchattacks

    return torchattacks


@torch.no_grad()
def _is_misclassified(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Bool (N,); logits with NaN or infinity decide nothing."""
    logits = model(images)
    return (logits.argmax(1) != labels) & logits.isfinite().all(1)


def _check_inputs(images: torch.Tensor, labels: torch.Tensor) -> None:
    if images.ndim != 4 or images.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"expected float images (N, C, H, W), got {images.shape=}, {images.dtype=}")
    if labels.shape != images.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(f"expected int64 labels ({len(images)},), got {labels.shape=}, {labels.dtype=}")
    # torchattacks would clamp normalised images without a word, and attack something else.
    if not ((images >= 0) & (images <= 1)).all():
        low, high = (f"{bound:g}" for bound in torch.aminmax(images.detach()))
        raise ValueError(f"expected images in [0, 1], got values from {low} to {high}; models normalise by themselves")
