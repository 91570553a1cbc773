"""What an attack is, as checked data: one frozen model per kind, told apart by `kind`.

A spec says everything that decides what the attack proposes, except the images, the model and the
random seed. `spec.model_dump(mode="json")` is its resolved form: what manifests store and
fingerprints hash. Keys and defaults are therefore part of the results format.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal, Union

from pydantic import (
    AfterValidator,
    Field,
    SerializerFunctionWrapHandler,
    StringConstraints,
    model_serializer,
    model_validator,
)
from pydantic_core import PydanticCustomError

from lrrobust.config_file import Settings
from lrrobust.eps import Ladder
from lrrobust.gradient_rules import GradientOf
from lrrobust.norm import LinfOrL2, Norm

#: What no attack may be called, as rows of reports are: `lrrobust.report.naming.WORST_CASE`.
RESERVED_NAME = "worst_case"


def _check_name(name: str) -> str:
    if not re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,63}", name):
        raise PydanticCustomError(
            "name",
            'expected a name, for a file its stem, of at most 64 lower-case letters, digits, "_" and "-", not led by these two',
        )
    if name == RESERVED_NAME:
        raise PydanticCustomError("name", "expected another name: tables call by it what any attack of a norm breaks")
    return name


#: What the model computes in while it is attacked. Verdicts are float32 in any case.
Precision = Literal["float32", "bf16"]

#: The stem of the attack's file. Part of file names in the results, hence lower case and short.
Name = Annotated[str, AfterValidator(_check_name)]

#: Of steps, queries, starts, passes or classes; what nobody would wait for is a slip.
Count = Annotated[int, Field(ge=1, le=1_000_000)]

Description = Annotated[str, StringConstraints(max_length=400)]


class _Spec(Settings):
    #: Whether the attack knows no budget, but looks for the nearest adversarial image of each image.
    minimises: ClassVar[bool] = False
    #: Whether it follows gradients, rather than answers alone; and whether of answers it needs more than the class.
    needs_gradient: ClassVar[bool] = True
    needs_logits: ClassVar[bool] = True

    name: Name
    description: Description = ""
    eps: Ladder
    #: Leave out, at each eps, the images that an earlier attack of the run broke there in the same norm. Set by
    #: the suite: a worst case then costs less, but the rows of one attack no longer stand for it alone.
    survivors_only: bool = False
    #: Passes whose mean logits the attack sees, and their gradient, for randomised models; see `lrrobust.attacks.expectation`.
    eot_iter: Count = 1

    @property
    def max_forward_passes(self) -> int:
        """Upper bound of the forward passes for one image, where one pass is one answer."""
        return len(self.eps)

    @property
    def max_backward_passes(self) -> int:
        """Upper bound of the gradients for one image, where one pass is one answer."""
        return self.max_forward_passes if self.needs_gradient else 0

    @model_serializer(mode="wrap")
    def _leave_out_later_settings(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without what came later and has its default, so that runs and baselines of before keep their identity."""
        settings = serialise(self)
        if settings.get("eot_iter") == 1:
            del settings["eot_iter"]
        return settings

    @model_validator(mode="after")
    def _check_linf_budget(self) -> _Spec:
        if self.norm == "linf" and self.eps[-1] > 1:
            raise PydanticCustomError(
                "linf_eps",
                "eps: expected budgets of at most 1, the whole pixel range, for linf"
                " (grey levels are written as fractions, 4/255); largest is {largest}",
                {"largest": f"{self.eps[-1]:g}"},
            )
        return self


class FgsmSpec(_Spec):
    """Fast gradient sign method: one step of size eps along the sign of the gradient.

    Args:
        precision: as in `PgdSpec`.

    Source: Goodfellow et al., Explaining and Harnessing Adversarial Examples, 2015, section 4.
    """

    kind: Literal["fgsm"]
    norm: Literal["linf"] = "linf"
    precision: Precision = "float32"


class PgdSpec(_Spec):
    """Projected gradient descent along the gradient of the cross-entropy, or of the margin.

    With a target the search goes towards that class, where the loss of other attacks may be flat; what counts does not
    change: an image is broken when it is taken for any class but its own.

    Args:
        steps: gradient steps per restart.
        step_size_ratio: step size = step_size_ratio * eps / steps, so that the attack can cross the ball.
        random_start: start at a random point of the ball instead of at the image.
        restarts: independent runs; only useful with a random start or target.
        precision: "bf16" runs the model under autocast to bfloat16, forward and backward.
        loss: "ce", the cross-entropy, or "margin", the lead of the nearest other class, which the scale of the logits
            does not matter to.
        target: "none", "random", "least_likely", "top_k", or the number of a class; see `lrrobust.attacks.targets`.
        targets: how many classes "top_k" tries, each with `restarts` starts, K - 1 at most; without effect on others.
        sparsity: share of the values that a step in l1 changes; without effect in other norms.
        warm_start: begin the first restart at a larger budget where it ended at the one before.

    Source: Madry et al., Towards Deep Learning Models Resistant to Adversarial Attacks, 2018,
    section 2.1; step size 2.5 eps/steps from section 5 (L2-bounded attacks). l1: Tramer and Boneh, Adversarial
    Training and Robustness for Multiple Perturbations, 2019, section 2.2. Targets: Kurakin et al., Adversarial Machine
    Learning at Scale, 2017, section 3.
    """

    kind: Literal["pgd"]
    norm: Norm
    steps: Count
    step_size_ratio: Annotated[float, Field(gt=0)] = 2.5
    random_start: bool = True
    restarts: Count = 1
    precision: Precision = "float32"
    loss: Literal["ce", "margin"] = "ce"
    target: Literal["none", "random", "least_likely", "top_k"] | Annotated[int, Field(ge=0)] = "none"
    targets: Count = 9
    sparsity: Annotated[float, Field(gt=0, le=1)] = 0.01
    warm_start: bool = False

    @property
    def max_forward_passes(self) -> int:
        passes = len(self.eps) * self.steps * self.restarts * (self.targets if self.target == "top_k" else 1)
        # Targets are chosen by a forward pass.
        return passes if self.target == "none" else passes + 1

    @model_validator(mode="after")
    def _check_restarts_differ(self) -> PgdSpec:
        if self.restarts > 1 and not self.random_start and self.target != "random":
            raise PydanticCustomError(
                "restarts",
                "restarts: expected 1 with random_start: false, as every restart would be the same",
            )
        return self


def _check_differ(gradients: tuple[GradientOf, ...]) -> tuple[GradientOf, ...]:
    if len(set(gradients)) < len(gradients):
        raise PydanticCustomError("gradients", "expected each gradient once; `restarts` adds starts")
    return gradients


class PgdAdaptiveSpec(_Spec):
    """Projected gradient descent by gradients of smoother layers; see `lrrobust.attacks.adaptive`.

    Args:
        gradients: what the gradient is taken of, one after the other; see `lrrobust.gradient_rules`.
        temperature: divides the attention scores of "tempered".
        steps, step_size_ratio, precision: as in `PgdSpec`.
        restarts: random starts by each of the gradients.

    Source: Athalye et al., Obfuscated Gradients Give a False Sense of Security, 2018, section 4.1.
    """

    kind: Literal["pgd_adaptive"]
    norm: LinfOrL2
    gradients: Annotated[tuple[GradientOf, ...], Field(min_length=1), AfterValidator(_check_differ)]
    temperature: Annotated[float, Field(gt=0)]
    steps: Count
    step_size_ratio: Annotated[float, Field(gt=0)] = 2.5
    restarts: Count = 1
    precision: Precision = "float32"

    @property
    def max_forward_passes(self) -> int:
        return len(self.eps) * len(self.gradients) * self.steps * self.restarts


class CwSpec(_Spec):
    """Carlini and Wagner's minimal L2 attack; runs once, and `eps` says where its distances are read off.

    Args:
        binary_search_steps: values of the trade-off c tried per image.
        steps: Adam steps per value of c.
        lr: Adam's learning rate, in the attack's own variable.
        initial_c: first trade-off, weight of the classification loss against the squared distance; more where the
            model, linearised at the image, needs more.
        confidence: kappa, margin in logits by which another class must win; zero or more.
        abort_early: end an image's search for one c once its loss has stopped falling.

    Source: Carlini and Wagner, Towards Evaluating the Robustness of Neural Networks, 2017,
    sections V and VI-A.
    """

    minimises: ClassVar[bool] = True

    kind: Literal["cw"]
    norm: Literal["l2"] = "l2"
    binary_search_steps: Count
    steps: Count
    lr: Annotated[float, Field(gt=0)]
    initial_c: Annotated[float, Field(gt=0)]
    confidence: Annotated[float, Field(ge=0)] = 0.0
    abort_early: bool = True

    @property
    def max_forward_passes(self) -> int:
        return 1 + self.binary_search_steps * self.steps


class ApgdSpec(_Spec):
    """Auto-PGD: gradient ascent with momentum whose step size follows from how the ascent goes.

    Args:
        loss: "ce", the cross-entropy; "dlr", which ignores the scale of the logits; or "targeted_dlr", the
            same towards each of the likeliest other classes in turn.
        targets: how many classes "targeted_dlr" tries, K - 1 at most; without effect on the other losses.
        steps: gradient steps of a start.
        rho: share of steps between two checkpoints in which the loss must rise, or the step size is halved; not in l1.
        restarts: starts at a budget, and target.
        warm_start: begin the first restart at a larger budget where the one at the budget before was best.

    Source: Croce and Hein, Reliable Evaluation of Adversarial Robustness with an Ensemble of Diverse
    Parameter-free Attacks, 2020, sections 3 and 4; l1: Croce and Hein, Mind the box, 2021.
    """

    kind: Literal["apgd"]
    norm: Norm
    loss: Literal["ce", "dlr", "targeted_dlr"]
    targets: Count = 9
    steps: Count = 100
    rho: Annotated[float, Field(gt=0, le=1)] = 0.75
    restarts: Count = 1
    warm_start: bool = False

    @property
    def max_forward_passes(self) -> int:
        if self.loss == "targeted_dlr":
            return 1 + len(self.eps) * self.steps * self.restarts * self.targets
        return len(self.eps) * self.steps * self.restarts


class SquareSpec(_Spec):
    """Square attack: random search over squares, by the model's answers alone.

    Args:
        queries: forward passes of a start.
        p_init: share of the pixels that a square covers at first.
        rescale_schedule: shrink squares in proportion to `queries` instead of after fixed numbers of them.
        restarts: starts at a budget.

    Source: Andriushchenko et al., Square Attack: a query-efficient black-box adversarial attack via random
    search, 2020, section 3.
    """

    needs_gradient: ClassVar[bool] = False

    kind: Literal["square"]
    norm: LinfOrL2
    queries: Count = 5000
    p_init: Annotated[float, Field(gt=0, le=1)] = 0.8
    rescale_schedule: bool = False
    restarts: Count = 1

    @property
    def max_forward_passes(self) -> int:
        return len(self.eps) * self.queries * self.restarts


class HopSkipJumpSpec(_Spec):
    """HopSkipJump: small perturbations, by the class that the model answers alone.

    Runs once, and `eps` says where its distances are read off.

    Args:
        queries: forward passes, at most.
        initial_evaluations: random directions of the first estimate; later ones take more.

    Source: Chen, Jordan and Wainwright, HopSkipJumpAttack: a query-efficient decision-based attack, 2020, algorithm 2.
    """

    minimises: ClassVar[bool] = True
    needs_gradient: ClassVar[bool] = False
    needs_logits: ClassVar[bool] = False

    kind: Literal["hop_skip_jump"]
    norm: LinfOrL2
    queries: Count = 5000
    initial_evaluations: Count = 100

    @property
    def max_forward_passes(self) -> int:
        return self.queries


class MiFgsmSpec(_Spec):
    """MI-FGSM: gradient sign steps with momentum.

    Args:
        steps: gradient steps.
        step_size_ratio: step size = step_size_ratio * eps / steps.
        decay: weight of the momentum in the next step; the paper's mu.

    Source: Dong et al., Boosting Adversarial Attacks with Momentum, 2018, section 3.1.
    """

    kind: Literal["mi_fgsm"]
    norm: LinfOrL2
    steps: Count = 10
    step_size_ratio: Annotated[float, Field(gt=0)] = 1.0
    decay: Annotated[float, Field(ge=0)] = 1.0

    @property
    def max_forward_passes(self) -> int:
        return len(self.eps) * self.steps


class FabSpec(_Spec):
    """FAB, targeted: from linearised boundary to linearised boundary, each time nearer to the clean image.

    Runs once, and `eps` says where its distances are read off. In a suite for survivors an image is done once it is
    broken at the smallest eps.

    Args:
        targets: how many of the likeliest other classes are tried in turn, K - 1 at most.
        steps: steps towards each of them.
        overshoot: how far a step goes, in units of the way to the linearised boundary; the paper's eta.
        largest_pull: largest weight of the way from the clean image; the paper's alpha_max.
        backward_share: share of an adversarial perturbation that is kept for the next step; the paper's beta.

    Source: Croce and Hein, Minimally distorted Adversarial Attacks with a Fast Adaptive Boundary Attack, 2020,
    section 3; defaults of AutoAttack.
    """

    minimises: ClassVar[bool] = True

    kind: Literal["fab_t"]
    norm: LinfOrL2
    targets: Count = 9
    steps: Count = 100
    overshoot: Annotated[float, Field(ge=1)] = 1.05
    largest_pull: Annotated[float, Field(ge=0, lt=1)] = 0.1
    backward_share: Annotated[float, Field(gt=0, le=1)] = 0.9

    @property
    def max_forward_passes(self) -> int:
        # One to choose targets, and five on the line to the clean image.
        return 6 + 2 * self.targets * self.steps


class FmnSpec(_Spec):
    """FMN: gradient steps in a ball whose radius follows from whether the image is adversarial.

    Runs once, and `eps` says where its distances are read off.

    Args:
        steps: gradient steps.
        first_step_size, last_step_size: of the steps, in units of the radius; the paper's alpha is a length.
        first_change, last_change: shares by which the radius changes with a step; the paper's gamma.

    Source: Pintor et al., Fast Minimum-norm Adversarial Attacks through Adaptive Norm Constraints, 2021, section 2.
    """

    minimises: ClassVar[bool] = True

    kind: Literal["fmn"]
    norm: Norm
    steps: Count = 100
    first_step_size: Annotated[float, Field(gt=0)] = 1.0
    last_step_size: Annotated[float, Field(gt=0)] = 0.01
    first_change: Annotated[float, Field(gt=0, lt=1)] = 0.05
    last_change: Annotated[float, Field(gt=0, lt=1)] = 0.001

    @property
    def max_forward_passes(self) -> int:
        return self.steps


class DeepFoolSpec(_Spec):
    """DeepFool: across the nearest of the linearised boundaries, until the class is left.

    Runs once, and `eps` says where its distances are read off.

    Args:
        targets: how many of the likeliest other classes are looked at, K - 1 at most.
        steps: at most so many; most images take two or three.
        overshoot: how much farther than to the boundary a step goes, as a share of its way.

    Source: Moosavi-Dezfooli et al., DeepFool: a simple and accurate method to fool deep neural networks, 2016.
    """

    minimises: ClassVar[bool] = True

    kind: Literal["deepfool"]
    norm: LinfOrL2
    targets: Count = 9
    steps: Count = 50
    overshoot: Annotated[float, Field(gt=0)] = 0.02

    @property
    def max_forward_passes(self) -> int:
        return 2 + self.steps

    @property
    def max_backward_passes(self) -> int:
        return self.targets * (1 + self.steps)


class CustomSpec(_Spec):
    """An attack of one's own, see `lrrobust.attacks.custom`; no file can name one.

    Args:
        code_sha256: of the function as it is loaded, so that another one begins another run.
        passes: forward passes for one image and budget, about, which the time left is told by.
    """

    # What it follows is not known: checks ask of the model what they would ask for either, and make attacks of their own.
    needs_gradient: ClassVar[bool] = False
    needs_logits: ClassVar[bool] = False

    kind: Literal["custom"] = "custom"
    norm: Norm
    code_sha256: str
    passes: Annotated[Count, Field(exclude=True)] = 100
    #: (model, images, labels, eps) -> images.
    propose: Annotated[Callable[..., Any], Field(exclude=True)]

    @property
    def max_forward_passes(self) -> int:
        return len(self.eps) * self.passes


AttackSpec = Annotated[
    Union[
        FgsmSpec,
        PgdSpec,
        PgdAdaptiveSpec,
        CwSpec,
        ApgdSpec,
        SquareSpec,
        HopSkipJumpSpec,
        MiFgsmSpec,
        FabSpec,
        FmnSpec,
        DeepFoolSpec,
    ],
    Field(discriminator="kind"),
]
