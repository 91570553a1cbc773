"""Budgets as people write them in configuration files."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import PydanticCustomError

_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d{1,2})?"
_FRACTION = re.compile(rf"\s*({_NUMBER})\s*(?:/\s*({_NUMBER})\s*)?")


def parse_eps(value: Any) -> Any:
    """Read "8/255", "0.125/255" and "1e-3" as the nearest float; leave all but strings as they are.

    PyYAML hands over fractions, and exponents without a decimal point, as strings.

    >>> parse_eps("8/255") == 8 / 255
    True

    Raises:
        PydanticCustomError: the string is neither a number nor a fraction of two.
    """
    if not isinstance(value, str):
        return value
    match = _FRACTION.fullmatch(value) if len(value) <= 40 else None
    numerator, denominator = match.groups() if match else (None, None)
    if numerator is None or (denominator is not None and Fraction(denominator) == 0):
        raise PydanticCustomError("eps", 'expected a number or a fraction such as "8/255"')
    # Exact until the one rounding at the end: "0.5/255" and "1/510" are the same budget.
    return float(Fraction(numerator) / Fraction(denominator or 1))


def write_eps(eps: float) -> float | str:
    """What `parse_eps` reads as that number, as people would write it: grey levels, where that is shorter.

    >>> write_eps(8 / 255), write_eps(0.5)
    ('8/255', 0.5)
    """
    text = f"{eps * 255:.6g}/255"
    return text if len(text) < len(repr(eps)) and parse_eps(text) == eps else eps


def _check_ladder(ladder: tuple[float, ...]) -> tuple[float, ...]:
    if any(low >= high for low, high in zip(ladder, ladder[1:])):
        raise PydanticCustomError("ladder", "expected budgets in ascending order, each once")
    return ladder


#: A budget in pixel units of [0, 1], zero or more; a number, or a string such as "8/255".
Eps = Annotated[float, BeforeValidator(parse_eps), Field(ge=0)]

#: Budgets to evaluate, ascending, each once.
Ladder = Annotated[tuple[Eps, ...], Field(min_length=1), AfterValidator(_check_ladder)]
