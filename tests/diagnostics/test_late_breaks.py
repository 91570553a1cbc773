"""When rows say that an attack was still breaking images at its end."""

from types import SimpleNamespace

import numpy as np
import pytest

from lrrobust.attacks.specs import ApgdSpec, CwSpec, FgsmSpec, MiFgsmSpec, PgdSpec
from lrrobust.diagnostics.late_breaks import check_late_breaks
from lrrobust.diagnostics.outcomes import Outcomes

PGD = PgdSpec(name="pgd", kind="pgd", norm="linf", eps=(1 / 255, 2 / 255), steps=20)
N = 100


def look(spec, *passes):
    """The result where `passes` at each budget broke the first images, one each, and all others withstood."""
    backward = np.full((len(spec.eps), N), 500.0)
    is_broken = np.zeros((len(spec.eps), N), dtype=bool)
    for level, spent in enumerate(passes):
        backward[level, : len(spent)], is_broken[level, : len(spent)] = spent, True
    unused = np.full((len(spec.eps), N), np.nan)
    outcomes = Outcomes(spec, spec.eps, is_broken, np.ones_like(is_broken), unused[0], unused[0], unused, backward)
    (found,) = check_late_breaks(SimpleNamespace(outcomes=(outcomes,)))
    assert found.attack == spec.name
    return found


def test_a_share_that_is_more_than_chance_fails():
    # Two budgets are two tests: where 5 % of images break late, as many as 12 of 100 do half a percent of the time.
    assert look(PGD, [], [20] * 11).passed is True
    found = look(PGD, [], [20] * 12)
    assert found.passed is False
    four = PGD.model_copy(update={"eps": tuple(eps / 255 for eps in (1, 2, 3, 4))})
    assert look(four, [20] * 12).passed is True
    assert found.detail.startswith("The last quarter of its 20 steps breaks 12 of 100 images at eps 2/255, where they are most")


def test_the_last_quarter_begins_after_three_quarters_of_the_steps():
    # The 17th pass looks at the image after 16 steps.
    assert look(PGD, [17] * 50).passed is False
    assert look(PGD, [16] * 50).passed is True
    # No pass: broken at a smaller budget.
    found = look(PGD, [0] * 50)
    assert found.passed is True and found.detail == "The last quarter of its 20 steps breaks none of 100 images at any eps."


def test_passes_that_average_over_a_random_model_are_one_step():
    averaged = PGD.model_copy(update={"eot_iter": 8})
    assert look(averaged, [8 * 17] * 50).passed is False
    assert look(averaged, [8 * 16] * 50).passed is True


def test_restarts_belong_to_one_search_and_targets_to_several():
    restarts = PGD.model_copy(update={"restarts": 4})
    # Any step of the last start.
    assert look(restarts, [62] * 50).passed is False
    assert look(restarts, [20] * 50).passed is True
    targets = PGD.model_copy(update={"target": "top_k", "targets": 4})
    assert look(targets, [62] * 50).passed is True
    assert look(targets, [20] * 50).passed is False
    apgd = ApgdSpec(name="apgd", kind="apgd", norm="linf", eps=(1 / 255,), loss="targeted_dlr", targets=9, steps=100)
    assert look(apgd, [101] * 50).passed is True
    assert look(apgd, [200] * 50).passed is False


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (PGD.model_copy(update={"steps": 4}), "Rows do not tell which of its 4 steps"),
        (PGD.model_copy(update={"step_size_ratio": 1.0}), "All steps of pgd together are 1 eps long"),
        (
            MiFgsmSpec(name="mi_fgsm", kind="mi_fgsm", norm="linf", eps=(1 / 255,)),
            "All steps of mi_fgsm together are 1 eps long",
        ),
    ],
)
def test_what_rows_cannot_say_is_not_known(spec, reason):
    found = look(spec, [1])
    assert found.passed is None and found.detail.startswith(reason)


def test_steps_that_were_not_counted():
    found = look(PGD, [np.nan] * 3)
    assert found.passed is None and "were not counted" in found.detail


def test_attacks_without_steps_or_budget_are_left_out():
    cw = CwSpec(name="cw", kind="cw", eps=(0.1,), binary_search_steps=4, steps=30, lr=0.01, initial_c=0.1)
    fgsm = FgsmSpec(name="fgsm", kind="fgsm", eps=(1 / 255,))
    outcomes = [SimpleNamespace(spec=spec, eps=spec.eps) for spec in (cw, fgsm, PGD.model_copy(update={"eps": (0.0,)}))]
    assert list(check_late_breaks(SimpleNamespace(outcomes=outcomes))) == []
