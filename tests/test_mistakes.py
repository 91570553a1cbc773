from typing import Literal

import pytest
from pydantic import BaseModel, ConfigDict, ValidationError

from lrrobust.mistakes import explain_mistakes


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
        ({"nmae": "a"}, "nmae: unknown key, expected one of of_norm, phases, target"),
        ({"name": "a", "phase": []}, "phase: unknown key, did you mean phases?"),
        ({"name": "a", "phases": [{"epochs": 1, "sise": 2}]}, "phases.0.sise: unknown key, did you mean size?"),
        ({"name": "a", "phases": [{"size": 2}]}, "expected also phases.0.epochs, found only name, phases"),
        ({}, "expected also name, found only nothing"),
        ({"name": 3}, "name: expected text, found 3"),
        ({"name": "a", "target": "rnd"}, "target: expected 'none' or 'random' or expected a whole number, found 'rnd'"),
        ({"name": "a", "of_norm": {"l7": 1.0}}, "of_norm.l7: expected 'linf' or 'l2', found 'l7'"),
        ({"name": "a", "phases": "many"}, "phases: expected a list, found 'many'"),
        ({"name": "a", "phases": ["many"]}, "phases.0: expected keys and values, found 'many'"),
        ({"name": "x" * 200, "target": "y" * 200}, f"target: expected 'none' or 'random' or expected a whole number, found '{'y' * 56}..."),
    ],
)
def test_one_line_in_the_words_of_the_file(data, line):
    with pytest.raises(ValidationError) as caught:
        Outer.model_validate(data)
    assert explain_mistakes(caught.value, data, Outer) == line
