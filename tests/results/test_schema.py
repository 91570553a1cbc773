import math

import numpy as np
import pandas as pd
import pytest

from lrrobust.results import OUTCOMES, SCHEMA, breaking_eps, rows_to_table

BROKEN = {
    "index": 0,
    "key": "val_1",
    "label": 3,
    "wnid": "n01440764",
    "attack": "pgd",
    "norm": "linf",
    "eps": 1 / 255,
    "clean_prediction": 3,
    "is_clean_correct": True,
    "adversarial_prediction": 5,
    "is_broken": True,
    "outcome": "broken",
    "linf_distance": 1 / 255,
    "l2_distance": 0.4,
    "clean_margin": 2.5,
    "adversarial_margin": -0.5,
    "wall_s": 0.1,
    "l1_distance": 3.0,
    "is_broken_quantized": True,
    "forward_passes": 20,
    "backward_passes": 20,
}
NOTHING_FOUND = {
    "adversarial_prediction": None,
    "linf_distance": None,
    "l2_distance": None,
    "adversarial_margin": None,
    "l1_distance": None,
    "is_broken_quantized": None,
}
ROBUST = BROKEN | NOTHING_FOUND | {"index": 1, "is_broken": False, "outcome": "robust", "forward_passes": None}
WRONG = BROKEN | NOTHING_FOUND | {"index": 2, "is_clean_correct": False, "outcome": "wrong_when_clean"}


def test_rows_come_back_exactly():
    rows = [BROKEN, ROBUST, WRONG | {"eps": math.inf}]
    table = rows_to_table(rows)
    assert table.schema.equals(SCHEMA, check_metadata=True)
    assert table.to_pylist() == rows


def test_each_row_breaks_its_image_from_the_smaller_of_eps_and_distance_on():
    beyond = BROKEN | {"index": 3, "linf_distance": 1.1 / 255}  # by the tolerance of the ball
    earlier = BROKEN | NOTHING_FOUND | {"index": 4, "outcome": "broken_by_earlier_attack"}
    near = BROKEN | {"index": 5, "norm": "l2", "eps": 0.5}
    rows = rows_to_table([ROBUST, WRONG, beyond, earlier, near]).to_pandas(types_mapper=pd.ArrowDtype)
    assert breaking_eps(rows).tolist() == [math.inf, 0.0, 1 / 255, 1 / 255, 0.4]


def test_arrays_and_rows_give_the_same_table():
    rows = [BROKEN, BROKEN | {"index": 7}]
    columns = {name: np.array([row[name] for row in rows]) for name in SCHEMA.names}
    assert rows_to_table(columns).equals(rows_to_table(rows))
    nullable = columns | {"forward_passes": pd.array([20, None], dtype="Int64")}
    assert rows_to_table(nullable)["forward_passes"].to_pylist() == [20, None]


def test_no_rows_are_a_table_too():
    assert rows_to_table([]).equals(SCHEMA.empty_table())


def test_nan_is_not_null():
    table = rows_to_table([BROKEN | {"clean_margin": math.nan, "adversarial_margin": math.nan}])
    assert table["adversarial_margin"].null_count == 0
    assert math.isnan(table["clean_margin"][0].as_py())


def test_every_column_has_unit_and_meaning():
    for field in SCHEMA:
        assert field.metadata[b"unit"] and field.metadata[b"meaning"], field.name


@pytest.mark.parametrize(
    "row, message",
    [
        (BROKEN | {"epsilon": 1.0}, r"row 1 .* unknown \['epsilon'\]"),
        ({name: value for name, value in BROKEN.items() if name != "wall_s"}, r"row 1 .* missing \['wall_s'\]"),
        (BROKEN | {"clean_margin": None}, "column 'clean_margin' must not hold nulls"),
        (BROKEN | {"outcome": "survived"}, "outcome must be one of .* got 'survived' in row 1"),
        (BROKEN | {"norm": "l0"}, "norm must be one of linf, l2, l1, got 'l0' in row 1"),
        (BROKEN | {"eps": -1.0}, "eps must be zero or more"),
        (BROKEN | {"eps": math.nan}, "eps must be zero or more"),
        (BROKEN | {"label": 1.5}, "column 'label' must hold int32"),
        (BROKEN | {"label": 2**40}, "column 'label' must hold int32"),
        (BROKEN | {"key": 5}, "column 'key' must hold string"),
        (BROKEN | {"is_broken": False}, "is_broken must be true exactly"),
        (BROKEN | {"is_clean_correct": False}, "wrong_when_clean exactly where"),
        (BROKEN | {"l2_distance": None}, "l2_distance must be given exactly"),
        (BROKEN | {"l1_distance": None}, "l1_distance must be given exactly"),
        (ROBUST | {"is_broken_quantized": False}, "is_broken_quantized must be null"),
        (ROBUST | {"linf_distance": 0.1}, "linf_distance must be given exactly"),
        (BROKEN | {"linf_distance": math.inf}, "linf_distance must be finite"),
        (BROKEN | {"l2_distance": -0.1}, "l2_distance must be finite and zero or more"),
    ],
)
def test_what_is_not_a_row_is_refused(row, message):
    with pytest.raises(ValueError, match=message):
        rows_to_table([BROKEN, row])


@pytest.mark.parametrize("name, values", [("label", [True]), ("is_broken", [1]), ("index", [0.0])])
def test_types_are_not_converted(name, values):
    columns = {column: [BROKEN[column]] for column in SCHEMA.names} | {name: values}
    with pytest.raises(ValueError, match=f"column '{name}' must hold"):
        rows_to_table(columns)


def test_columns_of_different_length_are_refused():
    columns = {name: [BROKEN[name]] for name in SCHEMA.names} | {"eps": [0.1, 0.2]}
    with pytest.raises(ValueError, match="one length"):
        rows_to_table(columns)


def test_every_outcome_is_accepted():
    rows = {
        "broken": BROKEN,
        "broken_at_smaller_eps": BROKEN | {"outcome": "broken_at_smaller_eps"},
        "broken_by_earlier_attack": ROBUST | {"outcome": "broken_by_earlier_attack", "is_broken": True},
        "robust": ROBUST,
        "rejected": ROBUST | {"outcome": "rejected", "adversarial_prediction": 5},
        "wrong_when_clean": WRONG,
    }
    assert set(rows) == set(OUTCOMES)
    assert rows_to_table(list(rows.values())).num_rows == len(OUTCOMES)
