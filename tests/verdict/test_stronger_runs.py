"""A failed check of one run beside a stronger one: when it no longer matters, and when it still does."""

import math

import pytest
from made_rows import by_pgd

from lrrobust.diagnostics.records import DIAGNOSTICS_FILE, Diagnostic
from lrrobust.verdict.judge import judge_claims

N = 200
INF = math.inf
PIXEL = 1 / 255
LADDER = (0.5 / 255, 1 / 255, 2 / 255)


def distances(standing, broken_at):
    """So many images stand, and the others fall."""
    return [INF] * standing + [broken_at] * (N - standing)


def convergence(passed, norm="linf"):
    detail = "At eps 1/255 Auto-PGD breaks 20 of the 100 images (of 200) that the attacks left standing."
    return Diagnostic(name="convergence", passed=passed, detail=detail, norm=norm)


@pytest.fixture
def judged(make_run, make_claim, large_eps, note):
    """Of the usual claim on A and B, each with two runs of these attacks; PGD of A failed a check that the other passed."""

    def judged(of_models):
        runs = [make_run(model, {name: attack}) for model in "AB" for name, attack in of_models[model].items()]
        note(runs[0], [convergence(False), large_eps("pgd")])
        note(runs[1], [convergence(True), large_eps("apgd")])
        return judge_claims([make_claim()], runs).results

    return judged


@pytest.fixture
def verdict(make_run, make_claim, large_eps, note):
    """Of a claim on A, whose PGD failed a check beside a stronger attack, and on B, which nothing protects."""

    def judged(
        standing=120,
        weaker=180,
        stronger_notes=(convergence(True),),
        failed=convergence(False),
        stronger="apgd",
        claim=None,
        **attack,
    ):
        runs = []
        for model in "AB":
            is_ours = model == "A"
            broken_at = 0.9 * PIXEL if is_ours else PIXEL / 4
            of_weaker, of_stronger = (distances(count if is_ours else 0, broken_at) for count in (weaker, standing))
            runs += [
                make_run(model, by_pgd(of_weaker)),
                make_run(model, {stronger: dict(distances=of_stronger, steps=100, **attack)}, seed=0),
            ]
        note(runs[0], [failed, large_eps("pgd")])
        note(runs[1], [*stronger_notes, large_eps(stronger)])
        (result,) = judge_claims([make_claim(**claim or {})], runs).results
        return result

    return judged


def answers(result):
    return [guard.answered_by for guard in result.safeguards if guard.answered_by]


def test_a_run_that_found_what_the_other_missed_answers_its_failed_check(verdict):
    result = verdict()
    assert result.verdict == "supported"
    assert answers(result) == ["A-sample-V1-200-apgd"]
    (reason,) = [reason for reason in result.reasons if reason.startswith("Another run answers what would be doubted: ")]
    assert "A-sample-V1-200-pgd, convergence: At eps 1/255" in reason
    assert reason.endswith(
        "It no longer matters: A-sample-V1-200-apgd passed this check, and at eps 1/255 in linf broke 60 of 200 images that "
        "A-sample-V1-200-pgd had left standing, and 0 fewer."
    )


@pytest.mark.parametrize(
    "options",
    [
        {"standing": 180},
        {"standing": 175},
        {"weaker": 60},
        {"stronger_notes": ()},
        {"stronger_notes": (convergence(None),)},
        {"stronger_notes": (convergence(False),)},
        {"stronger_notes": (convergence(True, "l2"),)},
        {"stronger_notes": (convergence(True), Diagnostic(name="determinism", passed=False, detail="Random."))},
        {"stronger_notes": (convergence(True), Diagnostic(name="black_box", passed=False, detail="Masked.", norm="linf"))},
        {"failed": Diagnostic(name="finite_differences", passed=False, detail="No gradient of the model.")},
        {"failed": Diagnostic(name="random_noise", passed=False, detail="Noise breaks more.", norm="linf")},
        {"claim": {"attacks": ("pgd",)}},
        {"eps": (1 / 255,)},
    ],
    ids=[
        "finds nothing more", "finds no more than chance does", "leaves standing what the other broke", "has no such check",
        "such a check says nothing", "fails it itself", "in another norm", "the model is random", "fails another check",
        "a check of the model", "a check that it lacks", "does not judge", "lacks budgets that judge",
    ],
)  # fmt: skip
def test_otherwise_it_withholds_the_verdict(verdict, options):
    result = verdict(**options)
    assert result.verdict == "inconclusive" and not answers(result)


def test_at_a_budget_that_holds_plain_grey_the_stronger_run_alone_must_succeed(verdict, large_eps):
    result = verdict(failed=large_eps("pgd", False), stronger_notes=(convergence(True),))
    assert result.verdict == "supported" and len(answers(result)) == 1


def test_what_the_other_run_was_not_asked_for_is_not_found_beyond_it(judged):
    """At budgets that the weaker run does not have, any attack breaks more than it."""
    of_both = {model: [INF] * 100 + [ours] * 100 for model, ours in (("A", 2 * PIXEL), ("B", PIXEL / 4))}
    (result,) = judged(
        {model: {"pgd": dict(distances=d, eps=(PIXEL / 2,)), "apgd": dict(distances=d)} for model, d in of_both.items()}
    )
    assert result.verdict == "inconclusive" and not answers(result)


def test_a_run_on_fewer_images_answers_for_those_alone(judged):
    on_all, on_fewer = judged(
        {
            "A": {"pgd": dict(distances=[INF] * N), "apgd": dict(distances=[INF] * 50 + [0.9 * PIXEL] * 100)},
            "B": {"pgd": dict(distances=[PIXEL / 4] * N), "apgd": dict(distances=[PIXEL / 4] * 150)},
        }
    )
    assert (on_all.pairing.n, on_fewer.pairing.n) == (200, 150)
    assert on_all.verdict == "inconclusive" and not answers(on_all)
    assert answers(on_fewer) == ["A-sample-V1-150-apgd"]


@pytest.mark.parametrize(
    ("notes", "broken", "options", "answered"),
    [
        ((convergence(True),), 0, {}, True),
        ((), 0, {}, False),
        ((convergence(False),), 0, {}, False),
        ((convergence(True),), 20, {}, False),
        ((convergence(True),), 0, {"eps": (PIXEL,)}, False),
        ((convergence(True, "l2"),), 0, {}, False),
    ],
)
def test_a_checked_run_answers_for_one_without_diagnostics(
    make_run, make_claim, large_eps, note, notes, broken, options, answered
):
    """`cw` of A was not looked into, and breaks `broken` images that `pgd` leaves standing."""
    runs = []
    for model, reach in (("A", INF), ("B", PIXEL / 4)):
        of_cw = [0.9 * PIXEL] * (broken if model == "A" else 0)
        runs.append(make_run(model, {"cw": dict(distances=of_cw + [reach] * (N - len(of_cw)))}))
        runs.append(make_run(model, {"pgd": dict(distances=[reach] * N, **options)}))
    (runs[0].folder / DIAGNOSTICS_FILE).unlink()
    note(runs[1], [*notes, large_eps("pgd")])
    (result,) = judge_claims([make_claim()], runs).results
    assert result.verdict == ("supported" if answered else "inconclusive")
    assert answers(result) == ["A-sample-V1-200-pgd"] * answered
    assert (
        any("cw carries no diagnostics" in reason and "pgd passed its checks" in reason for reason in result.reasons)
        == answered
    )
