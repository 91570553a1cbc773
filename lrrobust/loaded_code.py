"""The code of functions as it is loaded, which no comment changes and a cell of a notebook has too."""

from __future__ import annotations

from functools import partial
from types import CodeType, FunctionType
from typing import Any


def code_of(function: FunctionType) -> str:
    """Its bytecode and defaults; what it calls elsewhere is not seen."""
    return f"{_of_bytecode(function.__code__)} {function.__defaults__!r} {function.__kwdefaults__!r}"


def describe_callable(function: Any) -> str:
    """The same of anything that can be called, and the numbers, texts and functions that it was made with.

    These are what a nested function takes from around it, a `functools.partial` holds, or an object has for attributes. Others
    are told apart by their type alone.
    """
    if isinstance(function, FunctionType):
        cells = [cell.cell_contents for cell in function.__closure__ or ()]
        return f"{code_of(function)} {[_of_value(each) for each in cells]}"
    if isinstance(function, partial):
        held = [*function.args, *(each for pair in sorted(function.keywords.items()) for each in pair)]
        return f"{describe_callable(function.func)} {[_of_value(each) for each in held]}"
    method = getattr(type(function), "__call__", None)
    said = code_of(method) if isinstance(method, FunctionType) else ""
    attributes = sorted(getattr(function, "__dict__", {}).items())
    return f"{type(function).__qualname__} {said} {[(name, _of_value(value)) for name, value in attributes]}"


def _of_value(value: Any) -> str:
    if isinstance(value, (FunctionType, partial)):
        return describe_callable(value)
    return repr(value) if isinstance(value, (bool, int, float, str, tuple, list, type(None))) else type(value).__qualname__


def _of_bytecode(code: CodeType) -> str:
    return f"{code.co_code.hex()} {code.co_names} {[_of_constant(each) for each in code.co_consts]}"


def _of_constant(constant: Any) -> str:
    if isinstance(constant, CodeType):
        return _of_bytecode(constant)
    # In an order that is the same in every process.
    return str(sorted(map(repr, constant))) if isinstance(constant, frozenset) else repr(constant)
