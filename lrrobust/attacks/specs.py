"""What an attack is, as checked data: one frozen model per kind, told apart by `kind`.

A spec says everything that decides what the attack proposes, except the images, the model and the
random seed. `spec.model_dump(mode="json")` is its resolved form: what manifests store and
fingerprints hash. Keys and defaults are therefore part of the results format.
"""

from __future__ import annotations

import re
from typing import Annotated, ClassVar, Literal, Union

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, model_validator
from pydantic_core import PydanticCustomError

from lrrobust.eps import Ladder


def _check_name(name: str) -> str:
    if not re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,63}", name):
        raise PydanticCustomError(
            "name",
            'expected a file name of at most 64 lower-case letters, digits, "_" and "-", led by a letter or digit',
        )
    return name


#: What the model computes in while it is attacked. Verdicts are float32 in any case.
Precision = Literal["float32", "bf16"]

#: The stem of the attack's file. Part of file names in the results, hence lower case and short.
Name = Annotated[str, AfterValidator(_check_name)]

Description = Annotated[str, StringConstraints(max_length=400)]


class _Spec(BaseModel):
    # Strict: `steps: true` is not 1 and `steps: "20"` is not 20. Forbidding extra keys catches typos,
    # which would otherwise leave a default in force.
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    #: Whether the attack knows no budget, but looks for the nearest adversarial image of each image.
    minimises: ClassVar[bool] = False

    name: Name
    description: Description = ""
    eps: Ladder
    #: Leave out, at each eps, the images that an earlier attack of the run broke there in the same norm. Set by
    #: the suite: a worst case then costs less, but the rows of one attack no longer stand for it alone.
    survivors_only: bool = False

    @property
    def max_forward_passes(self) -> int:
        """Upper bound of the attack's own forward passes for one image."""
        return len(self.eps)

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
    """Projected gradient descent along the gradient of the cross-entropy.

    Args:
        steps: gradient steps per restart.
        step_size_ratio: step size = step_size_ratio * eps / steps, so that the attack can cross the ball.
        random_start: start at a random point of the ball instead of at the image.
        restarts: independent runs; only useful with a random start.
        precision: "bf16" runs the model under autocast to bfloat16, forward and backward.

    Source: Madry et al., Towards Deep Learning Models Resistant to Adversarial Attacks, 2018,
    section 2.1; step size 2.5 eps/steps from section 5 (L2-bounded attacks).
    """

    kind: Literal["pgd"]
    norm: Literal["linf", "l2"]
    steps: Annotated[int, Field(ge=1)]
    step_size_ratio: Annotated[float, Field(gt=0)] = 2.5
    random_start: bool = True
    restarts: Annotated[int, Field(ge=1)] = 1
    precision: Precision = "float32"

    @property
    def max_forward_passes(self) -> int:
        return len(self.eps) * self.steps * self.restarts

    @model_validator(mode="after")
    def _check_restarts_differ(self) -> PgdSpec:
        if self.restarts > 1 and not self.random_start:
            raise PydanticCustomError(
                "restarts",
                "restarts: expected 1 with random_start: false, as every restart would be the same",
            )
        return self


class CwSpec(_Spec):
    """Carlini and Wagner's minimal L2 attack; runs once, and `eps` says where its distances are read off.

    Args:
        binary_search_steps: values of the trade-off c tried per image.
        steps: Adam steps per value of c.
        lr: Adam's learning rate, in the attack's own variable.
        initial_c: first trade-off, weight of the classification loss against the squared distance.
        confidence: kappa, margin in logits by which another class must win; zero or more.
        abort_early: end an image's search for one c once its loss has stopped falling.

    Source: Carlini and Wagner, Towards Evaluating the Robustness of Neural Networks, 2017,
    sections V and VI-A.
    """

    minimises: ClassVar[bool] = True

    kind: Literal["cw"]
    norm: Literal["l2"] = "l2"
    binary_search_steps: Annotated[int, Field(ge=1)]
    steps: Annotated[int, Field(ge=1)]
    lr: Annotated[float, Field(gt=0)]
    initial_c: Annotated[float, Field(gt=0)]
    confidence: Annotated[float, Field(ge=0)] = 0.0
    abort_early: bool = True

    @property
    def max_forward_passes(self) -> int:
        return 1 + self.binary_search_steps * self.steps


AttackSpec = Annotated[Union[FgsmSpec, PgdSpec, CwSpec], Field(discriminator="kind")]
