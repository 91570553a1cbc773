import json

import pytest
from pydantic import TypeAdapter, ValidationError

from lrrobust.attacks.specs import AttackSpec, CwSpec, FgsmSpec, PgdSpec

SPEC = TypeAdapter(AttackSpec)
FGSM = {"kind": "fgsm", "name": "fgsm", "eps": ["1/255"]}
PGD = {"kind": "pgd", "name": "pgd", "norm": "linf", "eps": ["1/255"], "steps": 20}
CW = {"kind": "cw", "name": "cw", "eps": [1], "binary_search_steps": 5, "steps": 100, "lr": 0.01, "initial_c": 1}


def load(data):
    return SPEC.validate_json(json.dumps(data))


@pytest.mark.parametrize(
    ("written", "eps"),
    [
        (0.5, 0.5),
        (1, 1.0),
        ("8/255", 8 / 255),
        ("0.125/255", 0.125 / 255),
        (" 1 / 4 ", 0.25),
        ("1e-3", 0.001),
        ("1/1e3", 0.001),
        (".5", 0.5),
        (0, 0.0),
    ],
)
def test_eps_is_read_as_the_nearest_float(written, eps):
    (read,) = load({**FGSM, "eps": [written]}).eps
    assert read == eps and type(read) is float


@pytest.mark.parametrize(
    "written",
    ["nan", "inf", "-1/255", -0.1, "1/0", "1/0.0", "1/2/3", "8/", "", "eight", "1e999", "0x1", True, None, "1" * 50, "1_0"],
)
def test_what_is_no_budget_is_refused(written):
    with pytest.raises(ValidationError):
        load({**FGSM, "eps": [written]})


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity"])
def test_json_numbers_that_are_not_finite_are_refused(value):
    with pytest.raises(ValidationError):
        SPEC.validate_json('{"kind": "fgsm", "name": "fgsm", "eps": [%s]}' % value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({**FGSM, "eps": []}, "at least 1 item"),
        ({**FGSM, "eps": [0.2, 0.1]}, "ascending"),
        ({**FGSM, "eps": ["1/510", "0.5/255"]}, "ascending"),
        ({**FGSM, "eps": [0.1, 4]}, "at most 1.*linf"),
        ({**FGSM, "norm": "l2"}, "linf"),
        ({**FGSM, "steps": 3}, "Extra"),
        ({**FGSM, "name": "../fgsm"}, "file name"),
        ({**FGSM, "name": "fgsm\n"}, "file name"),
        ({**PGD, "norm": "l1"}, "linf"),
        ({**PGD, "steps": 0}, "greater than or equal to 1"),
        ({**PGD, "steps": True}, "integer"),
        ({**PGD, "steps": "20"}, "integer"),
        ({**PGD, "steps": 20.0}, "integer"),
        ({**PGD, "step_size_ratio": 0}, "greater than 0"),
        ({**PGD, "restarts": 2, "random_start": False}, "restarts"),
        ({**PGD, "precision": "fp16"}, "float32"),
        ({**CW, "norm": "linf"}, "l2"),
        ({**CW, "confidence": -1}, "greater than or equal to 0"),
        ({**CW, "initial_c": 0}, "greater than 0"),
        ({**CW, "abort_early": 1}, "boolean"),
        ({**CW, "kind": "deepfool"}, "kind"),
    ],
)
def test_bad_specs_are_refused(data, message):
    with pytest.raises(ValidationError, match=message):
        load(data)


def test_the_kind_chooses_the_class_and_defaults_are_those_of_the_paper():
    assert type(load(FGSM)) is FgsmSpec and type(load(CW)) is CwSpec
    pgd = load(PGD)
    assert type(pgd) is PgdSpec
    assert (pgd.step_size_ratio, pgd.random_start, pgd.restarts) == (2.5, True, 1)


def test_l2_budgets_may_exceed_1():
    assert load({**CW, "eps": [0.5, 3]}).eps == (0.5, 3.0)


def test_specs_are_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        load(PGD).steps = 3


# What fingerprints hash: a change here invalidates stored results.
RESOLVED = {
    "fgsm": {"name": "fgsm", "description": "", "eps": [1 / 255], "survivors_only": False, "kind": "fgsm",
             "norm": "linf", "precision": "float32"},
    "pgd": {
        "name": "pgd",
        "description": "",
        "eps": [1 / 255],
        "survivors_only": False,
        "kind": "pgd",
        "norm": "linf",
        "steps": 20,
        "step_size_ratio": 2.5,
        "random_start": True,
        "restarts": 1,
        "precision": "float32",
    },
    "cw": {
        "name": "cw",
        "description": "",
        "eps": [1.0],
        "survivors_only": False,
        "kind": "cw",
        "norm": "l2",
        "binary_search_steps": 5,
        "steps": 100,
        "lr": 0.01,
        "initial_c": 1.0,
        "confidence": 0.0,
        "abort_early": True,
    },
}


@pytest.mark.parametrize("data", [FGSM, PGD, CW], ids=lambda data: data["kind"])
def test_the_resolved_form_is_stable_and_reads_back(data):
    spec = load(data)
    resolved = spec.model_dump(mode="json")
    assert json.dumps(resolved) == json.dumps(RESOLVED[data["kind"]])
    assert load(resolved) == spec
