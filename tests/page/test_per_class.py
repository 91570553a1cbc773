import pytest
from scipy.stats import binomtest

from lrrobust.page.per_class import PER_CLASS_COLUMNS, compact, summarise_classes

LADDER = (1 / 255, 2 / 255)


@pytest.fixture
def classes(make_run):
    return summarise_classes({"a": make_run("a", class_names=("zebra", "ant", "bee", "cat"))})


def test_numbers_by_hand(classes):
    assert tuple(classes.columns) == PER_CLASS_COLUMNS
    pgd = classes[(classes["attack"] == "pgd")].set_index(["eps", "label"])
    # Class 0: images 0 (wrong) and 3 (withstands); 1: 1 (0.9) and 4 (0.5); 2: 2 (1.9) and 5 (withstands).
    assert pgd["robust_accuracy"].to_dict() == {
        (LADDER[0], 0): 0.5, (LADDER[0], 1): 0.0, (LADDER[0], 2): 1.0,
        (LADDER[1], 0): 0.5, (LADDER[1], 1): 0.0, (LADDER[1], 2): 0.5,
    }  # fmt: skip
    assert pgd["clean_accuracy"].loc[LADDER[0]].to_dict() == {0: 0.5, 1: 1.0, 2: 1.0}
    interval = binomtest(1, 2).proportion_ci(0.95, method="wilson")
    assert tuple(pgd.loc[(LADDER[0], 0), ["ci_low", "ci_high"]]) == pytest.approx((interval.low, interval.high))
    assert set(pgd["n"]) == {2} and pgd.loc[(LADDER[0], 0), "class"] == "zebra"


def test_compact_is_sorted_and_in_tenths_of_a_percent(classes):
    data = compact(classes[classes["attack"] == "pgd"])
    assert data["eps"] == ["1/255", "2/255"]
    assert [row[0] for row in data["rows"]] == ["bee", "zebra", "ant"]
    assert data["rows"][1] == ["zebra", 2, 500, 500, 95, 905, 500, 95, 905]
    assert compact(classes[classes["attack"] == "cw"])["eps"] == ["0.5", "any"]


def test_of_nothing():
    assert summarise_classes({}).empty
