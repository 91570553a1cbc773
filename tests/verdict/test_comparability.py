import pytest
from found_safeguards import GOOD, INF, PIXEL, failed, named
from made_rows import by_pgd

from lrrobust.verdict.evidence import collect_evidence
from lrrobust.verdict.judge import judge
from lrrobust.verdict.records import BOTH
from lrrobust.verdict.safeguards import check_evidence


@pytest.mark.parametrize(
    ("options", "name", "text"),
    [
        ({"treatment": {"images": [0, 1, 2, 9]}}, "same_images", "3 images were evaluated with both models; left out: 1 of A"),
        ({"treatment": {"input_size": 32}}, "same_configuration", "differ in input_size"),
        ({"control": {"seed": 3}}, "same_configuration", "differ in seed"),
        ({"treatment": {"is_complete": False}}, "complete_runs", "Not complete: A-sample"),
    ],
)
def test_models_treated_differently_withhold_both_verdicts(check, options, name, text):
    safeguards = check(**options)
    assert failed(safeguards) == [(name, None, BOTH)]
    assert text in named(safeguards, name)[0].detail


@pytest.mark.parametrize(
    ("key", "value"),
    [("input_size", 32), ("resize_size", 70), ("interpolation", "bicubic"), ("num_classes", 11), ("classes_sha256", "01" * 32)],
)
def test_what_decides_which_images_a_model_sees_must_be_the_same(check, key, value):
    def change(runs):
        runs[0].manifest["model"][key] = value

    safeguards = check(change=change)
    assert failed(safeguards) == [("same_configuration", None, BOTH)]
    assert f"differ in {key}" in named(safeguards, "same_configuration")[0].detail


@pytest.mark.parametrize(("copies", "passed"), [(0, True), (2, True), (3, False)])
def test_copies_of_images_are_no_more_images(make_claim, make_run, copies, passed):
    runs = [make_run(model, by_pgd([distance] * 200)) for model, distance in zip("AB", (INF, PIXEL / 2))]
    for run in runs:
        run.manifest["copies"] = copies
    (evidence,), _ = collect_evidence(make_claim(), runs)
    (found,) = named(check_evidence(evidence), "distinct_images")
    assert found.passed is passed and f"{copies} of 200 images have the same contents" in found.detail
    assert judge(evidence).verdict == ("supported" if passed else "inconclusive")


def test_runs_of_one_model_at_two_image_sizes_are_not_mixed(check_runs, make_run):
    runs = [
        make_run(model, {attack: dict(distances=[INF, PIXEL, PIXEL, 0])}, input_size=size)
        for model in "AB"
        for attack, size in (("pgd", 64), ("apgd", 96))
    ]
    (found,) = named(check_runs(runs), "same_configuration")
    assert not found.passed and found.withholds == ("supported", "refuted")
    assert "The runs of one model differ among themselves in input_size" in found.detail


def test_attacks_must_have_the_same_settings(check):
    def weaken(runs):
        runs[0].manifest["attacks"][0]["steps"] = 2

    assert failed(check(change=weaken)) == [("same_configuration", None, BOTH)]
    assert "attack pgd" in named(check(change=weaken), "same_configuration")[0].detail
    # What the claim does not ask for may differ.
    assert not failed(check(change=weaken, attacks=("cw",)))


def test_an_attack_that_only_one_model_met_is_a_difference(check_runs, make_run):
    runs = [make_run("A", GOOD), make_run("B", GOOD | {"extra": dict(distances=[INF, INF, INF, 0])})]
    assert failed(check_runs(runs)) == [("same_configuration", None, BOTH)]


def test_images_of_one_name_may_differ(check):
    def rename(runs):
        runs[0].manifest["dataset"]["sha256"] = "01" * 32

    safeguards = check(change=rename)
    assert failed(safeguards) == [("same_images", None, BOTH)]
    assert "same names for both models, but other hashes" in named(safeguards, "same_images")[0].detail


def test_more_images_of_one_side_say_nothing_against_those_of_both(make_claim, make_run):
    few = by_pgd([INF, PIXEL])
    runs = [make_run("A", GOOD), make_run("A", few), make_run("B", few)]
    (evidence,), _ = collect_evidence(make_claim(), runs)
    assert len(evidence.treatment.runs) == 2 and len(evidence.images) == 2
    assert named(check_evidence(evidence), "same_images")[0].passed


def test_two_names_of_one_network_are_no_comparison(make_claim, make_run):
    claim = make_claim(treatment="A@V1", control="A@V2")
    runs = [make_run("A", GOOD, weights=weights) for weights in ("V1", "V2")]
    for run in runs:
        run.manifest["model"]["code_sha256"] = "ab" * 32
    (evidence,), _ = collect_evidence(claim, runs)
    assert failed(check_evidence(evidence)) == [("one_network", None, BOTH)]
    assert "A@V1 and A@V2 are one network" in named(check_evidence(evidence), "one_network")[0].detail
    runs[1].manifest["model"]["state_sha256"] = "cd" * 32
    (evidence,), _ = collect_evidence(claim, runs)
    assert not failed(check_evidence(evidence))


@pytest.mark.parametrize("key", ["state_sha256", "code_sha256"])
def test_runs_of_two_trainings_are_no_model(check_runs, make_run, key):
    runs = [make_run("A", {name: attack}) for name, attack in GOOD.items()] + [make_run("B", GOOD)]
    runs[1].manifest["model"][key] = "01" * 32
    safeguards = check_runs(runs)
    assert failed(safeguards) == [("one_network", None, BOTH)]
    assert "The runs of A are of different parameters" in named(safeguards, "one_network")[0].detail


def test_runs_of_one_network_predict_alike(check_runs, make_run):
    for count, passed in ((1, True), (2, False)):
        attacks = {"pgd": dict(distances=[INF] * 100), "fgsm": dict(distances=[INF] * 100)}
        runs = [make_run("A", {name: attack}) for name, attack in attacks.items()] + [make_run("B", attacks)]
        runs[1].rows.loc[runs[1].rows["index"] < count, "clean_prediction"] = 7
        (found,) = named(check_runs(runs), "one_network")
        assert found.passed is passed and (passed or "2 of 100 images by A" in found.detail)


@pytest.mark.parametrize(
    ("recipes", "passed", "text"),
    [
        (("short 12", "short 12"), True, "the same recipe (short 12)"),
        (("short 12", "fast_at 34"), False, "different recipes (short 12; fast_at 34)"),
        (("short 12", None), None, "not known"),
        ((None, None), None, "not known"),
    ],
)
def test_models_of_different_recipes_are_not_compared(check, recipes, passed, text):
    ours, theirs = ({"recipe": recipe} for recipe in recipes)
    safeguards = check(treatment=ours, control=theirs)
    (found,) = named(safeguards, "same_training")
    assert found.passed is passed and text in found.detail and found.withholds == BOTH


@pytest.mark.parametrize(
    ("followed", "text"),
    [
        (("3 of 3 epochs", "3 of 3 epochs"), "(short 1234)."),
        (("3 of 3 epochs", "2 of 3 epochs"), "(short 1234); how far they followed it: A 3 of 3 epochs; B 2 of 3 epochs."),
        (("3 of 3 epochs", ""), "A 3 of 3 epochs; B not said."),
    ],
)
def test_who_learns_faster_may_be_stopped_earlier(check, followed, text):
    ours, theirs = ({"followed": length} for length in followed)
    (found,) = named(check(treatment=ours, control=theirs), "same_training")
    assert found.passed and found.detail.endswith(text)


def test_recipes_named_by_another_version_are_not_known_to_differ(check_runs, make_run):
    for recipes, passed, text in (
        (("short 1", "short 2"), None, "as older versions did"),
        (("short 1", "long 2"), False, "different"),
    ):
        runs = [make_run(model, by_pgd([INF] * 100), recipe=recipe) for model, recipe in zip("AB", recipes)]
        del runs[0].manifest["training"]["followed"]
        (found,) = named(check_runs(runs), "same_training")
        assert found.passed is passed and text in found.detail


def test_a_claim_may_mean_the_trainings(make_claim, make_run):
    distances = by_pgd([INF] * 200), by_pgd([PIXEL / 2] * 200)
    runs = [
        make_run(model, attacks, recipe=recipe) for model, attacks, recipe in zip("AB", distances, ("fast_at 1", "short 2"))
    ]
    for same_training, passed, verdict in ((True, False, "inconclusive"), (False, None, "supported")):
        (evidence,), _ = collect_evidence(make_claim(same_training=same_training), runs)
        (found,) = named(check_evidence(evidence), "same_training")
        assert found.passed is passed and judge(evidence).verdict == verdict
        assert ("`same_training: false`" in found.detail) == same_training


def test_a_run_given_twice_for_one_model_is_a_difference(check_runs, make_run):
    runs = [make_run("A", GOOD), make_run("A", GOOD), make_run("B", GOOD)]
    assert failed(check_runs(runs)) == [("same_configuration", None, BOTH)]


def test_attacks_may_be_spread_over_runs(check_runs, make_run):
    runs = [make_run("A", {name: attack}) for name, attack in GOOD.items()] + [make_run("B", GOOD)]
    assert not failed(check_runs(runs))


def test_different_clean_accuracy(check_runs, make_run):
    runs = [make_run("A", by_pgd([INF] * 97 + [0] * 3)), make_run("B", by_pgd([INF] * 100))]
    for limit, passed in ((0.02, False), (0.03, True)):
        (found,) = named(check_runs(runs, largest_clean_difference=limit), "clean_accuracy")
        assert found.passed is passed and "97.0 % for A and 100.0 % for B" in found.detail
        assert "(largest_clean_difference)" in found.detail


def test_where_both_models_are_broken_nothing_is_refuted(make_claim, make_run):
    for distances, telling in (
        ([PIXEL / 3] * 400, 0),
        ([INF] * 400, 0),
        ([PIXEL] * 400, 0),
        ([PIXEL] * 200 + [PIXEL / 3] * 200, 1),
        ([PIXEL / 3] * 390 + [INF] * 10, 3),
    ):
        attacks, passed = by_pgd(distances), telling > 0
        (evidence,), _ = collect_evidence(make_claim(), [make_run(model, attacks) for model in "AB"])
        (found,) = named(check_evidence(evidence), "telling_eps")
        assert (found.passed, found.withholds) == (passed, ("refuted",))
        assert judge(evidence).verdict == ("refuted" if passed else "inconclusive")
        assert found.detail.startswith(f"At {telling} of 3 budgets")
