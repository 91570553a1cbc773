from typing import Literal

import pytest
from pydantic import BaseModel, ConfigDict, ValidationError

from lrrobust.mistakes import describe_mistake, explain_mistakes


class Inner(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    epochs: int
    size: int = 64


class Outer(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    name: str
    target: Literal["none", "random"] | int = "none"
    phases: list[Inner] | None = None
    of_norm: dict[Literal["linf", "l2"], float] | None = None


@pytest.mark.parametrize(
    "data, line",
    [
        ({"nmae": "a"}, "nmae: unknown key, did you mean name?"),
        ({"x": 1}, "x: unknown key, expected one of name, of_norm, phases, target"),
        ({"name": "a", "": 3}, "'': unknown key, expected one of name, of_norm, phases, target"),
        ({"name": "a", "x\n::error": 1}, "x ::error: unknown key, expected one of name, of_norm, phases, target"),
        ({"name": "a", "phase": []}, "phase: unknown key, did you mean phases?"),
        ({"name": "a", "phases": [{"epochs": 1, "sise": 2}]}, "phases.0.sise: unknown key, did you mean size?"),
        ({"name": "a", "phases": [{"size": 2}]}, "expected also phases.0.epochs, found only size"),
        ({}, "expected also name, found only nothing"),
        ({"name": 3}, "name: expected text, found 3"),
        ({"name": "a", "target": "rnd"}, "target: expected 'none' or 'random' or a whole number, found 'rnd'"),
        ({"name": "a", "of_norm": {"l7": 1.0}}, "of_norm.l7: expected 'linf' or 'l2', found 'l7'"),
        ({"name": "a", "phases": "many"}, "phases: expected a list, as in [a, b], found 'many'"),
        ({"name": "a", "phases": ["many"]}, "phases.0: expected keys and values, as in {a: 1}, found 'many'"),
        (
            {"name": "x" * 200, "target": "y" * 200},
            f"target: expected 'none' or 'random' or a whole number, found '{'y' * 56}...",
        ),
    ],
)
def test_one_line_in_the_words_of_the_file(data, line):
    with pytest.raises(ValidationError) as caught:
        Outer.model_validate(data)
    assert explain_mistakes(caught.value, data, Outer) == line


def test_keys_that_no_file_holds_are_not_told_of():
    with pytest.raises(ValidationError) as caught:
        Outer.model_validate({"name": "stem", "pahses": []})
    assert (
        explain_mistakes(caught.value, {"name": "stem"}, Outer, given=["name"]) == "pahses: unknown key, did you mean phases?"
    )
    with pytest.raises(ValidationError) as caught:
        Inner.model_validate({"size": 3})
    assert (
        explain_mistakes(caught.value, {"name": "stem", "size": 3}, Inner, given=["name"])
        == "expected also epochs, found only size"
    )


def test_mistakes_of_other_versions_are_told_in_their_words():
    assert describe_mistake({"type": "greater_than", "msg": "Input should be\ngreater", "ctx": {}}) == "expected greater"
    assert describe_mistake({"type": "greater_than_equal", "msg": "", "ctx": {"ge": 1234567.0}}) == "expected at least 1234567"
