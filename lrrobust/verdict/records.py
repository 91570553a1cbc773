"""What a judged claim is made of: frozen records, and their JSON.

`claim.json` is the JSON of `Verdicts`. Accuracies and differences are fractions, distances and eps pixel units of
[0, 1]. Differences are always treatment minus control, whatever the direction of the claim. JSON has no infinity:
where a number may be infinite, None (null) stands for it, and the field says so.
"""

from __future__ import annotations

import math
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from lrrobust.diagnostics.records import Diagnostic
from lrrobust.eps import Ladder
from lrrobust.norm import Norm

#: Raised whenever a field is added, dropped or changes its meaning.
VERDICT_SCHEMA_VERSION = 6

#: The images that a number is over:
#: all               every image both models were evaluated on; wrong when clean counts as broken;
#: both_correct      those that both models classify correctly when clean;
#: matched_accuracy  all, less as many of the images that only the more accurate model classifies correctly
#:                   as make both equally accurate when clean; chosen by a hash of their names.
Population = Literal["all", "both_correct", "matched_accuracy"]

POPULATIONS: tuple[Population, ...] = ("all", "both_correct", "matched_accuracy")

Outcome = Literal["supported", "refuted", "inconclusive"]


class Record(BaseModel):
    """Base of the records: frozen, no unknown fields, no infinities or NaN."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def is_unbounded(eps: float, norm: str) -> bool:
    """Whether a budget reaches an image without content from every image: linf 1/2 turns any to plain grey.

    For l2 only infinity counts, as the size of the images is not known here.
    """
    return math.isinf(eps) or (norm == "linf" and eps >= 0.5)


class Subset(Record):
    """A draw of images from a data set; at least one field, and what is None may be anything."""

    model_config = ConfigDict(strict=True)

    n: int | None = Field(default=None, ge=1)
    """How many images."""
    seed: int | None = None
    """Seed of the draw."""
    balanced: bool | None = None
    """As many of each class."""
    sha256: str | None = Field(default=None, pattern="^[0-9a-f]{8,64}$")
    """First digits, at least 8, of the hash that reports name the images by; says all that the others say, and more."""

    @model_validator(mode="after")
    def _check(self) -> Subset:
        if self == Subset.model_construct():
            raise PydanticCustomError("subset", "expected n, seed, balanced or sha256, found none")
        return self

    @property
    def draw(self) -> dict[str, int | bool | None]:
        """How it is drawn, beside how many."""
        return {"seed": self.seed, "balanced": self.balanced}

    def __str__(self) -> str:
        return ", ".join(f"{key} = {value}" for key, value in self.model_dump(exclude_none=True).items())


class Claim(Record):
    """A claim that one model is more (or less) robust than another, and what would show it.

    What a file does not say is as in the claim that comes with the package.
    """

    # As any configuration: `significance: "0.05"` is no number.
    model_config = ConfigDict(strict=True)

    name: str
    """Stem of the claim's file."""
    statement: str = Field(min_length=1, max_length=400)
    """The claim in one sentence, as people read it."""
    source: str = Field(min_length=1, max_length=400)
    """Who claims it, and where."""
    treatment: str
    """Name of the model that the claim is about, as runs store it; with @ and the name of its weights, of these alone."""
    control: str
    """Name of the model it is compared with, likewise."""
    direction: Literal["more_robust", "less_robust"]
    """What the claim says of the treatment."""
    attacks: tuple[str, ...] | None = Field(default=None, min_length=1)
    """Attacks that judge the claim; None: all that both models were evaluated with."""
    eps: dict[Norm, Ladder] | None = Field(default=None, min_length=1)
    """Budgets that judge the claim, for each norm that does, ascending; None: all that both have."""
    dataset: str | None = None
    """Name of the data set that judges the claim; None: any, each judged by itself."""
    subset: Subset | None = None
    """The draw of images that judges the claim; None: any, each judged by itself."""
    significance: float = Field(default=0.05, gt=0, le=0.2)
    """Bound on the probability of a wrong *supported*, and of a wrong *refuted*."""
    power: float = Field(default=0.8, ge=0.5, lt=1)
    """Probability with which the smallest detectable difference is found."""
    smallest_difference: float = Field(default=0.02, gt=0, lt=1)
    """Smallest difference of robust accuracy that matters."""
    largest_clean_difference: float = Field(default=0.02, ge=0, lt=1)
    """Largest difference of clean accuracy at which the two count as equally well trained."""
    same_training: bool = True
    """Both must have been trained by the same recipe; false for claims about trainings, or about models as they are."""

    @model_validator(mode="after")
    def _check(self) -> Claim:
        if self.treatment == self.control:
            raise PydanticCustomError("models", "control: expected another model than the treatment")
        if any(ladder[0] == 0 for ladder in (self.eps or {}).values()):
            raise PydanticCustomError("eps", "eps: expected budgets above 0, at which nothing is attacked")
        if any(is_unbounded(ladder[-1], norm) for norm, ladder in (self.eps or {}).items()):
            raise PydanticCustomError("eps", "eps: expected budgets below linf 1/2, from which no model can be robust")
        return self


class Comparison(Record):
    """Robust accuracy of both models at one eps, on the same images."""

    attack: str
    """Name of the attack, or `worst_case`: broken by any attack of the norm."""
    norm: Norm
    eps: float
    """Positive and finite."""
    population: Population
    is_decisive: bool
    """The verdict rests on this row; the others are for information."""
    is_cumulative: bool
    """The attack met only what earlier attacks of its suite had left standing: what those broke counts as broken."""
    n: int
    """Images, one or more."""
    treatment_accuracy: float
    """Robust accuracy of the treatment."""
    control_accuracy: float
    """Robust accuracy of the control."""
    difference: float
    """Treatment minus control."""
    low: float
    """Lower limit of the difference's interval at confidence 1 - significance (Tango's score interval)."""
    high: float
    """Upper limit."""
    treatment_only: int
    """Discordant images: robust under the treatment, broken under the control."""
    control_only: int
    """Discordant images: robust under the control, broken under the treatment."""
    p_value: float
    """Exact McNemar test of no difference, two-sided."""
    p_holm: float
    """Adjusted by Holm over the family: the decisive rows of the population, or its other rows."""
    smallest_detectable: float | None
    """Smallest difference this row could have shown, given n and the discordance seen: were the true difference at
    one eps of every norm at least this large in every population, then the tests that *supported* asks for would
    all be passed with the claim's power. None: not even the largest possible difference would be shown."""


class CurveComparison(Record):
    """Area under the robustness curve: mean robust accuracy over the ladder of eps, uniform in log eps."""

    attack: str
    """Name of the attack, or `worst_case`."""
    norm: Norm
    population: Population
    is_cumulative: bool
    """As in `Comparison`."""
    n: int
    eps: tuple[float, ...]
    """The ladder, at least two, ascending."""
    treatment_robust: tuple[float, ...]
    """Robust accuracy of the treatment at each eps."""
    control_robust: tuple[float, ...]
    treatment_area: float
    """In [0, 1]: trapezoids over log eps, divided by the ladder's length."""
    control_area: float
    difference: float
    """Treatment minus control."""
    low: float
    """Lower limit by bootstrap over images (percentile), confidence 1 - significance."""
    high: float
    resamples: int
    """Bootstrap samples drawn."""


class SurvivalPoint(Record):
    """Share of images whose nearest adversarial image is farther away than `distance`."""

    distance: float
    treatment: float
    control: float


class NormComparison(Record):
    """Distances of the nearest adversarial images found by a minimal-norm attack, image by image.

    A failed attack counts as an infinite distance; an image that is wrong when clean has distance 0.
    """

    attack: str
    norm: Norm
    population: Population
    n: int
    treatment_median: float | None
    """Median distance; None: infinite."""
    control_median: float | None
    treatment_failures: int
    """Images of the treatment that the attack did not break."""
    control_failures: int
    treatment_farther: int
    """Images whose adversarial image is farther away under the treatment."""
    control_farther: int
    """Farther away under the control; the rest are ties."""
    sign_p_value: float
    """Exact two-sided sign test; ties left out."""
    wilcoxon_p_value: float
    """Two-sided Wilcoxon signed-rank test, ties of a pair left out, infinite differences ranked last."""
    rank_biserial: float
    """Effect size, in [-1, 1]: (sum of positive ranks - sum of negative ranks) / sum of all; 0 without differences."""
    survival: tuple[SurvivalPoint, ...]
    """Both survival curves at the same distances, ascending from 0, thinned to a few hundred."""


#: Verdicts that a safeguard withholds.
Withheld = tuple[Literal["supported", "refuted"], ...]
BOTH: Withheld = ("supported", "refuted")


class Safeguard(Record):
    """A condition that evidence must meet before it may support a claim."""

    name: str
    """Such as `same_images`, `same_training`, `clean_accuracy`, `unbounded_attack`, `stronger_attacks`."""
    passed: bool | None
    """None: could not be checked, and `detail` says why; only False withholds a verdict."""
    withholds: Withheld
    """The verdicts that become *inconclusive* when it has failed: both, or the one that would rest on the model
    whose robustness is in doubt."""
    detail: str
    """One sentence with the numbers."""
    attack: str | None = None
    """The attack concerned, where it is one."""
    answered_by: str | None = None
    """Folder of the run that made a failed check of another, or that it has none, immaterial, which then counts as passed;
    with commas, of several."""


class RunReference(Record):
    """A run that a verdict rests on."""

    role: Literal["treatment", "control"]
    folder: str
    """Last part of the run's folder."""
    fingerprint: str
    model: str
    weights: str | None
    state_sha256: str | None
    """Hash of the parameters."""
    attacks: tuple[str, ...]
    is_complete: bool
    commit: str | None
    """Commit of the code that computed it."""
    diagnostics: tuple[Diagnostic, ...] | None
    """None: the run carries none."""


class Pairing(Record):
    """The images that both models were evaluated on, and those lost on the way."""

    dataset: str
    dataset_sha256: tuple[str, ...]
    """Of the subsets evaluated, sorted; one when both models saw the same."""
    n: int
    """Images paired."""
    treatment_unpaired: int
    """Images of the treatment only, left out of every comparison."""
    control_unpaired: int
    both_correct: int
    """When clean."""
    treatment_correct_only: int
    control_correct_only: int
    discarded: int
    """Images that `matched_accuracy` leaves out."""
    treatment_clean: float
    """Clean accuracy of the treatment on the images paired."""
    control_clean: float


class ClaimResult(Record):
    """A verdict with everything it rests on."""

    claim: Claim
    verdict: Outcome
    reasons: tuple[str, ...]
    """Whole sentences; the first says the decisive thing."""
    pairing: Pairing
    comparisons: tuple[Comparison, ...]
    curves: tuple[CurveComparison, ...]
    norms: tuple[NormComparison, ...]
    safeguards: tuple[Safeguard, ...]
    runs: tuple[RunReference, ...]


class NotJudged(Record):
    """A claim on which the runs given say nothing."""

    claim: str
    """Its name."""
    reason: str
    """One sentence."""


class Verdicts(Record):
    """Everything in `claim.json`: one result for each claim and set of images, in the order of the claims."""

    schema_version: int = VERDICT_SCHEMA_VERSION
    made_with: str
    """Version and commit of the code that judged; `RunReference` holds those that computed the runs."""
    results: tuple[ClaimResult, ...]
    not_judged: tuple[NotJudged, ...]
