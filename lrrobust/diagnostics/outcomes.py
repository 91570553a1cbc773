"""What a run's rows say of its attacks, as arrays over the images that are correct when clean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lrrobust.attacks.specs import AttackSpec
from lrrobust.diagnostics.own_attacks import plain_pgd
from lrrobust.results import distances, texts
from lrrobust.threat import Norm

#: A class is one that images are taken for from so many on, and from this share of the mean count.
FEWEST_TAKEN, RARE = 2, 0.25

GOLDEN_RATIO = (1 + 5**0.5) / 2


def is_multi_step(spec: AttackSpec) -> bool:
    """Whether a white-box attack takes more than one gradient step."""
    return spec.needs_gradient and getattr(spec, "steps", 1) > 1


def is_black_box(spec: AttackSpec) -> bool:
    """Whether it is known to see answers alone; of attacks of one's own nothing is known."""
    return not spec.needs_gradient and spec.kind != "custom"


def is_climber(spec: AttackSpec) -> bool:
    """Whether it takes several gradient steps within a budget."""
    return is_multi_step(spec) and not spec.minimises


def aims_at_classes(spec: AttackSpec) -> bool:
    """Whether its last start leads to a chosen class, however near another one is."""
    return getattr(spec, "target", "none") != "none" or getattr(spec, "loss", None) == "targeted_dlr"


def aims_at_one_class(spec: AttackSpec) -> bool:
    """Whether it leads to a class that need not be among the nearest."""
    return getattr(spec, "target", "none") not in ("none", "top_k")


@dataclass(frozen=True)
class Outcomes:
    """What one attack did to N images at L budgets.

    Attributes:
        eps: (L,), ascending; infinity last for attacks that minimise the distance.
        is_broken: (L, N), by this attack, or by an earlier one where images that are broken leave the suite.
        is_attacked: (L, N); False for images that an earlier attack had broken.
        breaking_eps: (N,), smallest eps at which an image of this attack's own proves one broken, infinity where none does.
        clean_margin: (N,), logits.
        last_margin: (L, N), of the last proposal for images that withstood; NaN where there is none.
        backward_passes: (L, N); NaN where not counted.
    """

    spec: AttackSpec
    eps: tuple[float, ...]
    is_broken: NDArray[np.bool_]
    is_attacked: NDArray[np.bool_]
    breaking_eps: NDArray[np.float64]
    clean_margin: NDArray[np.float64]
    last_margin: NDArray[np.float64]
    backward_passes: NDArray[np.float64]

    @property
    def has_budget(self) -> bool:
        """Whether it attacked anything: a budget of 0 leaves nothing to find."""
        return any(0 < eps < np.inf for eps in self.eps)

    def tells_of(self, eps: float) -> bool:
        """Whether rows say what it breaks at that budget: one of its own, or any where it finds distances."""
        return eps in self.eps or self.spec.minimises

    def has_tried(self, eps: float) -> NDArray[np.bool_]:
        """Images that it was let at, (N,), at a budget or else at the next larger one."""
        return self.is_attacked[min(int(np.searchsorted(self.eps, eps)), len(self.eps) - 1)]

    def withstood(self, eps: float) -> NDArray[np.bool_]:
        """Images that it was let at and could not break within eps, (N,).

        Without rows of that budget, those that it could not break at the next larger one: which of the others it would
        have broken here is not known.
        """
        if self.eps[-1] < eps:
            return np.zeros(self.is_broken.shape[1], dtype=bool)
        within = eps if self.tells_of(eps) else self.eps[int(np.searchsorted(self.eps, eps))]
        return self.has_tried(eps) & (self.breaking_eps > within)


@dataclass(frozen=True)
class NormOutcomes:
    """Attacks of one norm: an image counts as broken by any of them, as in the worst case of a report."""

    norm: Norm
    attacks: tuple[Outcomes, ...]

    @property
    def name(self) -> str | None:
        """The attack's, where it is one alone."""
        return self.attacks[0].spec.name if len(self.attacks) == 1 else None

    @property
    def breaking_eps(self) -> NDArray[np.float64]:
        return np.minimum.reduce([attack.breaking_eps for attack in self.attacks])

    @property
    def by_gradient(self) -> NormOutcomes | None:
        """Those that see gradients and had a budget, without what black-box attacks broke; None where there are none."""
        attacks = tuple(attack for attack in self.attacks if attack.spec.needs_gradient and attack.has_budget)
        return replace(self, attacks=attacks) if attacks else None

    def broke(self, eps: float) -> NDArray[np.bool_]:
        """Images that one of these attacks broke within eps, (N,)."""
        return self.breaking_eps <= eps

    @property
    def _most_able(self) -> list[Outcomes]:
        """Those of several gradient steps: what one step leaves standing tells nothing beside them. All, where none is."""
        return [attack for attack in self.attacks if is_multi_step(attack.spec)] or list(self.attacks)

    def reaches(self, eps: float) -> bool:
        """Whether what was broken within eps by others can be compared with these: one had a budget as large."""
        return any(attack.eps[-1] >= eps for attack in self._most_able)

    def left_standing(self, eps: float) -> NDArray[np.bool_]:
        """Images that none of these attacks broke within eps, (N,), though each that has rows of that budget was let at them.

        What an attack not among these had broken before, one of these might have broken too: it is neither. Where none has
        rows of that budget, those that one could not break at a larger one.
        """
        here = [attack for attack in self._most_able if attack.tells_of(eps)]
        meet = np.logical_and if here else np.logical_or
        return meet.reduce([attack.withstood(eps) for attack in here or self._most_able]) & ~self.broke(eps)

    @property
    def climbers(self) -> list[Outcomes]:
        return [attack for attack in self.attacks if is_climber(attack.spec)]

    @property
    def budgets(self) -> list[float]:
        """Of all attacks together, ascending."""
        return sorted({eps for attack in self.attacks for eps in attack.eps if 0 < eps < np.inf})

    @property
    def strongest(self) -> AttackSpec:
        """The attack of several steps within a budget that itself broke most images, at the budgets of all.

        By gradients, unless all attacks are black-box ones, and towards no chosen class, unless all are. Where they minimise
        the distance, take one step, or are one's own, plain PGD stands in for them.
        """
        is_black = all(is_black_box(attack.spec) for attack in self.attacks)

        def strength(attack: Outcomes) -> tuple[bool, float]:
            broken = attack.breaking_eps <= np.array(self.budgets)[:, None]
            return not aims_at_classes(attack.spec), float(broken.mean())

        best = max(self.attacks if is_black else self.climbers, key=strength, default=None)
        return plain_pgd(self.norm) if best is None else best.spec

    def choose_eps(self, first: int | None = None) -> float:
        """The budget at which the attacks have broken nearest to half of the (first so many) images of which they tell.

        There a better attack has the most to find, and a worse one the most to miss. Where nothing is broken at any
        budget it is the largest, where everything is, the smallest.
        """
        shares = {}
        for eps in self.budgets:
            broke = self.broke(eps)[:first]
            told = int((broke | self.left_standing(eps)[:first]).sum())
            shares[eps] = broke.sum() / told if told else np.inf
        return min(shares, key=lambda eps: (abs(shares[eps] - 0.5), eps if shares[eps] > 0.5 else -eps))


def read_outcomes(rows: pd.DataFrame, specs: Sequence[AttackSpec]) -> tuple[NDArray[np.int64], tuple[Outcomes, ...]]:
    """Places in the run of the images that are correct when clean, and what each attack did to them.

    The first of them are spread over the whole run, however many one takes: data sets in folders are sorted by class.

    Args:
        rows: of a complete run, as `load_run` orders them.
        specs: its attacks.
    """
    grids = [(spec, *_grid(rows[(rows["attack"] == spec.name).to_numpy(bool)])) for spec in specs]
    is_correct = np.logical_and.reduce([grid["is_clean_correct"][0].astype(bool) for *_, grid in grids])
    places = np.flatnonzero(is_correct)
    # The multiples of an irrational number, modulo 1, that are below some share lie evenly among all.
    places = places[np.argsort(np.arange(len(places)) * GOLDEN_RATIO % 1)]
    return places, tuple(_outcomes(spec, eps, {name: of[:, places] for name, of in grid.items()}) for spec, eps, grid in grids)


def predicted_classes(rows: pd.DataFrame) -> tuple[int, ...]:
    """Classes that the model takes images for, ascending: those of all images correct when clean, and frequent others.

    The others are what it takes clean images for, and adversarial ones, each image once. Those seen less than `RARE` times as
    often as the mean are left out: a class that only ever follows another may come out first once in a while.
    """
    correct = rows.loc[rows["is_clean_correct"].to_numpy(bool), "label"].to_numpy(np.int64)
    clean = rows.drop_duplicates("index")["clean_prediction"].to_numpy(np.int64)
    broken = rows[rows["is_broken"].to_numpy(bool) & rows["adversarial_prediction"].notna().to_numpy(bool)]
    adversarial = broken.drop_duplicates(["index", "adversarial_prediction"])["adversarial_prediction"].to_numpy(np.int64)
    classes, counts = np.unique(np.concatenate([clean, adversarial]), return_counts=True)
    if not len(classes):
        return ()
    return tuple(np.union1d(correct, classes[counts >= max(FEWEST_TAKEN, RARE * counts.mean())]).tolist())


def _grid(rows: pd.DataFrame) -> tuple[tuple[float, ...], dict[str, NDArray]]:
    """The budgets, and the columns as (budgets, images); images in the order of the run."""
    eps = rows["eps"].to_numpy(np.float64)
    # Stable: rows of one budget stay in the order of the run.
    order = np.argsort(eps, kind="stable")
    ladder = np.unique(eps)
    columns = {name: rows[name].to_numpy(bool) for name in ("is_clean_correct", "is_broken")}
    columns |= {"outcome": texts(rows["outcome"]).to_numpy()}
    columns |= {"distance": distances(rows)}
    for name in ("clean_margin", "adversarial_margin", "backward_passes"):
        columns[name] = rows[name].to_numpy(np.float64, na_value=np.nan)
    return tuple(ladder.tolist()), {name: column[order].reshape(len(ladder), -1) for name, column in columns.items()}


def _outcomes(spec: AttackSpec, eps: tuple[float, ...], grid: dict[str, NDArray]) -> Outcomes:
    is_broken = grid["is_broken"]
    is_attacked = grid["outcome"] != "broken_by_earlier_attack"
    # A distance may exceed the eps it was accepted at by the tolerance of the ball.
    breaking = np.where(is_broken & is_attacked, np.minimum(np.array(eps)[:, None], grid["distance"]), np.inf)
    return Outcomes(
        spec=spec,
        eps=eps,
        is_broken=is_broken,
        is_attacked=is_attacked,
        breaking_eps=breaking.min(0),
        clean_margin=grid["clean_margin"][0],
        last_margin=np.where(is_broken, np.nan, grid["adversarial_margin"]),
        backward_passes=grid["backward_passes"],
    )
