import json

import pytest
from pydantic import TypeAdapter, ValidationError

from lrrobust.attacks.specs import AttackSpec, CwSpec, FgsmSpec, PgdSpec

SPEC = TypeAdapter(AttackSpec)
FGSM = {"kind": "fgsm", "name": "fgsm", "eps": ["1/255"]}
PGD = {"kind": "pgd", "name": "pgd", "norm": "linf", "eps": ["1/255"], "steps": 20}
ADAPTIVE = {
    "kind": "pgd_adaptive",
    "name": "pgd_adaptive",
    "norm": "l2",
    "eps": [1],
    "gradients": ["exact", "tempered"],
    "temperature": 4,
    "steps": 20,
}
CW = {"kind": "cw", "name": "cw", "eps": [1], "binary_search_steps": 5, "steps": 100, "lr": 0.01, "initial_c": 1}
FAB = {"kind": "fab_t", "name": "fab_t", "norm": "linf", "eps": ["1/255"]}
FMN = {"kind": "fmn", "name": "fmn", "norm": "l1", "eps": [1]}
DEEPFOOL = {"kind": "deepfool", "name": "deepfool", "norm": "l2", "eps": [1]}


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
        ({**FGSM, "name": "../fgsm"}, "name, for a file its stem"),
        ({**FGSM, "name": "fgsm\n"}, "name, for a file its stem"),
        ({**PGD, "norm": "l3"}, "linf"),
        ({**PGD, "steps": 0}, "greater than or equal to 1"),
        ({**PGD, "steps": True}, "integer"),
        ({**PGD, "steps": "20"}, "integer"),
        ({**PGD, "steps": 20.0}, "integer"),
        ({**PGD, "step_size_ratio": 0}, "greater than 0"),
        ({**PGD, "restarts": 2, "random_start": False}, "restarts"),
        ({**PGD, "precision": "fp16"}, "float32"),
        ({**PGD, "target": "likely"}, "least_likely"),
        ({**PGD, "target": -1}, "greater than or equal to 0"),
        ({**PGD, "target": True}, "integer"),
        ({**PGD, "targets": 0}, "greater than or equal to 1"),
        ({**PGD, "sparsity": 0}, "greater than 0"),
        ({**FAB, "norm": "l1"}, "linf"),
        ({**FAB, "overshoot": 0.9}, "greater than or equal to 1"),
        ({**FAB, "backward_share": 1.1}, "less than or equal to 1"),
        ({**FMN, "first_change": 1}, "less than 1"),
        ({**DEEPFOOL, "overshoot": 0}, "greater than 0"),
        ({**ADAPTIVE, "gradients": []}, "at least 1 item"),
        ({**ADAPTIVE, "gradients": ["exact", "exact"]}, "each gradient once"),
        ({**ADAPTIVE, "gradients": ["smooth"]}, "absolute_difference"),
        ({**ADAPTIVE, "temperature": 0}, "greater than 0"),
        ({**CW, "norm": "linf"}, "l2"),
        ({**CW, "confidence": -1}, "greater than or equal to 0"),
        ({**CW, "initial_c": 0}, "greater than 0"),
        ({**CW, "abort_early": 1}, "boolean"),
        ({**CW, "kind": "boundary"}, "kind"),
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
    "fgsm": {
        "name": "fgsm",
        "description": "",
        "eps": [1 / 255],
        "survivors_only": False,
        "kind": "fgsm",
        "norm": "linf",
        "precision": "float32",
    },
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
        "loss": "ce",
        "target": "none",
        "targets": 9,
        "sparsity": 0.01,
        "warm_start": False,
    },
    "pgd_adaptive": {
        "name": "pgd_adaptive",
        "description": "",
        "eps": [1.0],
        "survivors_only": False,
        "kind": "pgd_adaptive",
        "norm": "l2",
        "gradients": ["exact", "tempered"],
        "temperature": 4.0,
        "steps": 20,
        "step_size_ratio": 2.5,
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
    "fab_t": {
        "name": "fab_t",
        "description": "",
        "eps": [1 / 255],
        "survivors_only": False,
        "kind": "fab_t",
        "norm": "linf",
        "targets": 9,
        "steps": 100,
        "overshoot": 1.05,
        "largest_pull": 0.1,
        "backward_share": 0.9,
    },
    "fmn": {
        "name": "fmn",
        "description": "",
        "eps": [1.0],
        "survivors_only": False,
        "kind": "fmn",
        "norm": "l1",
        "steps": 100,
        "first_step_size": 1.0,
        "last_step_size": 0.01,
        "first_change": 0.05,
        "last_change": 0.001,
    },
    "deepfool": {
        "name": "deepfool",
        "description": "",
        "eps": [1.0],
        "survivors_only": False,
        "kind": "deepfool",
        "norm": "l2",
        "targets": 9,
        "steps": 50,
        "overshoot": 0.02,
    },
}


@pytest.mark.parametrize("data", [FGSM, PGD, ADAPTIVE, CW, FAB, FMN, DEEPFOOL], ids=lambda data: data["kind"])
def test_the_resolved_form_is_stable_and_reads_back(data):
    spec = load(data)
    resolved = spec.model_dump(mode="json")
    assert json.dumps(resolved) == json.dumps(RESOLVED[data["kind"]])
    assert load(resolved) == spec
