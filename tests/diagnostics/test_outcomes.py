import dataclasses
import math

import numpy as np
import pandas as pd
import pytest

from lrrobust.attacks.specs import CwSpec, PgdSpec, SquareSpec
from lrrobust.diagnostics.outcomes import NormOutcomes, Outcomes, predicted_classes, read_outcomes
from lrrobust.diagnostics.own_attacks import plain_pgd

PGD = PgdSpec(name="pgd", kind="pgd", norm="l2", eps=(0.05, 0.1, 0.2, 0.4), steps=8)
CW = CwSpec(name="cw", kind="cw", eps=(0.1, 0.4), binary_search_steps=4, steps=30, lr=0.01, initial_c=0.1)


def outcomes(*breaking_eps, spec=PGD):
    n, levels = len(breaking_eps), len(spec.eps)
    breaking = np.array(breaking_eps)
    is_broken = breaking <= np.array(spec.eps)[:, None]
    nan = np.full((levels, n), np.nan)
    return Outcomes(spec, spec.eps, is_broken, np.ones_like(is_broken), breaking, np.ones(n), nan, nan)


@pytest.mark.parametrize(
    ("breaking", "eps"),
    [((0.05, 0.1, 0.4, math.inf), 0.2), ((math.inf,) * 4, 0.4), ((0.01,) * 4, 0.05), ((0.3, 0.3, 0.3, 0.3), 0.2)],
)
def test_the_budget_looked_at_is_nearest_to_half(breaking, eps):
    # Of equally near ones the largest. In the last case nothing is broken up to 0.2 and all at 0.4: equally far, the largest
    # where nothing is broken.
    assert NormOutcomes("l2", (outcomes(*breaking),)).choose_eps() == eps


def test_the_worst_case_of_a_norm_and_its_strongest_attack():
    weak = outcomes(0.1, math.inf, math.inf)
    strong = outcomes(math.inf, 0.2, 0.2, spec=PGD.model_copy(update={"name": "strong"}))
    norm = NormOutcomes("l2", (weak, strong))
    assert norm.breaking_eps.tolist() == [0.1, 0.2, 0.2]
    assert norm.strongest is strong.spec and norm.name is None
    assert NormOutcomes("l2", (weak,)).name == "pgd"
    single = outcomes(0.1, spec=PGD.model_copy(update={"steps": 1}))
    minimal = outcomes(0.01, spec=CW)
    # Neither is an attack of several steps within a budget.
    assert NormOutcomes("l2", (single, minimal)).strongest == plain_pgd("l2")
    square = outcomes(0.01, spec=SquareSpec(name="square", kind="square", norm="l2", eps=(0.1,)))
    assert NormOutcomes("l2", (square,)).strongest is square.spec
    assert NormOutcomes("l2", (square, single)).strongest == plain_pgd("l2")
    assert NormOutcomes("l2", (square, strong)).strongest is strong.spec


def test_rows_become_arrays_whose_first_images_are_spread_over_the_run(evaluated, sound_linear):
    specs = (PGD, CW)
    data, run = evaluated(sound_linear, specs)
    places, (pgd, cw) = read_outcomes(run.rows, specs)
    assert sorted(places) == list(range(len(data)))
    for first in (8, 24, 64):
        assert np.diff([0, *sorted(places[:first]), len(data)]).max() <= 3 * len(data) / first
    assert pgd.eps == PGD.eps and cw.eps == (0.1, 0.4, math.inf)
    for found in (pgd, cw):
        rows = run.rows[run.rows["attack"] == found.spec.name]
        for level, eps in enumerate(found.eps):
            of_level = rows[rows["eps"] == eps].set_index("index").loc[[data.indices[place] for place in places]]
            assert found.is_broken[level].tolist() == of_level["is_broken"].tolist()
            assert np.array_equal(found.backward_passes[level], of_level["backward_passes"].to_numpy(float))
        assert 0 < found.is_broken.mean() < 1
        assert (np.isfinite(found.breaking_eps) == found.is_broken.any(0)).all()
        # Of images that withstood, the last margin is known for attacks with a budget.
    assert np.isfinite(pgd.last_margin[~pgd.is_broken]).all() and np.isnan(pgd.last_margin[pgd.is_broken]).all()
    assert cw.breaking_eps.max() < math.inf and not set(cw.breaking_eps) & set(CW.eps)


def test_images_wrong_when_clean_are_left_out(evaluated, sound_linear):
    data, run = evaluated(sound_linear, (PGD,))
    rows = run.rows.copy()
    is_wrong = rows["index"].isin([data.indices[0], data.indices[7]])
    rows.loc[is_wrong, "is_clean_correct"] = False
    places, (pgd,) = read_outcomes(rows, (PGD,))
    assert len(places) == len(data) - 2 and not {0, 7} & set(places.tolist())
    assert pgd.is_broken.shape == (4, len(data) - 2)


def test_broken_by_an_earlier_attack_is_known(evaluated, sound_linear):
    later = PGD.model_copy(update={"name": "later", "survivors_only": True})
    _, run = evaluated(sound_linear, (PGD, later))
    _, (first, second) = read_outcomes(run.rows, (PGD, later))
    assert first.is_attacked.all() and first.is_broken.any()
    assert np.array_equal(~second.is_attacked, first.is_broken)
    # Which is not its own doing, nor is what it was not let at left standing by it.
    assert (second.breaking_eps[first.is_broken[0]] == math.inf).all() and not second.has_tried(0.05)[first.is_broken[0]].any()
    norm = NormOutcomes("l2", (second,))
    assert np.array_equal(norm.left_standing(0.2), ~first.is_broken[2] & ~second.is_broken[2])
    # Without rows of a budget it is known of what withstood the next larger one.
    assert np.array_equal(norm.left_standing(0.3), ~first.is_broken[3] & ~second.is_broken[3])
    of_both = NormOutcomes("l2", (first, second)).breaking_eps
    assert of_both.tolist() == np.minimum(first.breaking_eps, second.breaking_eps).tolist()
    assert dataclasses.replace(second).is_broken[~second.is_attacked].all()


def test_the_strongest_is_it_by_what_it_broke_itself():
    first = outcomes(0.05, 0.2, math.inf, math.inf)
    later = outcomes(math.inf, math.inf, 0.4, math.inf, spec=PGD.model_copy(update={"name": "later"}))
    # As rows have it where it met survivors only: what the first had broken counts as broken.
    is_broken = later.is_broken | first.is_broken
    later = dataclasses.replace(later, is_broken=is_broken, is_attacked=~first.is_broken)
    assert NormOutcomes("l2", (first, later)).strongest is first.spec
    # Towards a class only where there is no other.
    aimed = outcomes(0.05, 0.05, 0.05, 0.05, spec=PGD.model_copy(update={"name": "aimed", "target": "least_likely"}))
    assert NormOutcomes("l2", (first, aimed)).strongest is first.spec
    assert NormOutcomes("l2", (aimed,)).strongest is aimed.spec


def test_a_budget_of_which_nothing_is_told_is_not_looked_at():
    spec = PGD.model_copy(update={"survivors_only": True})
    few = outcomes(0.05, math.inf, math.inf, math.inf, spec=spec)
    is_attacked = np.ones_like(few.is_attacked)
    is_attacked[2:] = False
    assert NormOutcomes("l2", (few,)).choose_eps() == 0.4
    assert NormOutcomes("l2", (dataclasses.replace(few, is_attacked=is_attacked),)).choose_eps() == 0.1


def test_who_says_what_was_left_standing():
    near = outcomes(0.05, math.inf, math.inf, math.inf, spec=PGD.model_copy(update={"eps": (0.05, 0.1)}))
    far = outcomes(0.4, 0.4, math.inf, math.inf, spec=PGD.model_copy(update={"name": "far", "eps": (0.4,)}))
    minimal = outcomes(0.3, 0.3, 0.3, math.inf, spec=CW)
    one_step = outcomes(0.05, 0.05, math.inf, math.inf, spec=PGD.model_copy(update={"steps": 1, "eps": (0.4,)}))
    for attacks, eps, left in [
        ((near,), 0.1, [0, 1, 1, 1]),
        # What it broke at 0.1 it may have broken at 0.07; of more than 0.1 it says nothing.
        ((near,), 0.07, [0, 1, 1, 1]),
        ((near,), 0.2, [0, 0, 0, 0]),
        ((far,), 0.2, [0, 0, 1, 1]),
        # Rows of the budget itself say more.
        ((near, far), 0.1, [0, 1, 1, 1]),
        ((near, far), 0.2, [0, 0, 1, 1]),
        ((near, far, minimal), 0.2, [0, 1, 1, 1]),
        ((far, minimal), 0.4, [0, 0, 0, 1]),
        # One step breaks images, but leaves none standing.
        ((one_step, near), 0.4, [0, 0, 0, 0]),
        ((one_step,), 0.4, [0, 0, 1, 1]),
    ]:
        norm = NormOutcomes("l2", attacks)
        assert norm.left_standing(eps).tolist() == [bool(one) for one in left], (len(attacks), eps)
        assert norm.reaches(eps) == (attacks[-1] is not near or eps <= 0.1)


def test_classes_that_images_are_taken_for():
    # Of 0 to 2 clean images are, of 3 adversarial ones, of 4 a single one, as where a decoy leads by chance.
    rows = pd.DataFrame(
        {
            "index": np.repeat(np.arange(40), 2),
            "label": np.repeat(np.arange(40) % 3, 2),
            "clean_prediction": np.repeat(np.arange(40) % 3, 2),
            "is_clean_correct": True,
            "is_broken": np.arange(80) % 2 == 1,
            "adversarial_prediction": [None, 3] * 39 + [None, 4],
        }
    )
    assert predicted_classes(rows) == (0, 1, 2, 3)
    # Where images are of it, however few, it is one.
    assert predicted_classes(rows.assign(label=[4, 4] + [0] * 78)) == (0, 1, 2, 3, 4)
