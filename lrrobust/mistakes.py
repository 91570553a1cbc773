"""What pydantic found wrong in a file, in one line and in the words of the file."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, get_args

from pydantic import BaseModel, ValidationError

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

#: Kind of mistake -> what was expected; numbers in braces are the mistake's own.
_EXPECTED = {
    "bool_type": "true or false",
    "dict_type": "keys and values",
    "finite_number": "a finite number",
    "float_type": "a number",
    "greater_than": "more than {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "int_from_float": "a whole number",
    "int_type": "a whole number",
    "less_than": "less than {lt:g}",
    "less_than_equal": "at most {le:g}",
    "list_type": "a list",
    "literal_error": "{expected}",
    "missing": "this key",
    "model_type": "keys and values",
    "string_pattern_mismatch": "text that matches {pattern}",
    "string_too_long": "text of at most {max_length} characters",
    "string_too_short": "text of at least {min_length} characters",
    "string_type": "text",
    "too_short": "at least {min_length} of them",
    "tuple_type": "a list",
}


def describe_mistake(mistake: ErrorDetails) -> str:
    """One of `ValidationError.errors()` as what was expected, without where it was made."""
    expected = _EXPECTED.get(mistake["type"])
    if expected is not None:
        return f"expected {expected.format(**mistake.get('ctx', {}))}"
    return " ".join(mistake["msg"].replace("Input should be", "expected").split())


def explain_mistakes(error: ValidationError, data: Mapping[str, Any], model: type[BaseModel], within: Sequence[str] = ()) -> str:
    """The line that explains most of what is wrong: an unknown key before missing ones, which it may stand for.

    Args:
        error: of validating `data`.
        data: what the file holds.
        model: what it should hold, for the names of its keys.
        within: what pydantic puts before the path of every key, such as the tag of a union.
    """
    mistakes = error.errors(include_url=False)
    unknown = next((each for each in mistakes if each["type"] == "extra_forbidden"), None)
    if unknown is not None:
        *where, key = _path(unknown, data, within)
        known = sorted(set(_fields_at(model, where)) - {"name"})
        near = difflib.get_close_matches(str(key), known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(known)}"
        return f"{_dotted([*where, key])}: unknown key, {hint}"
    missing = [_dotted(each["loc"][len(within) :]) for each in mistakes if each["type"] == "missing"]
    if missing:
        # All at once: who writes a file would otherwise meet them one by one.
        return f"expected also {', '.join(missing)}, found only {', '.join(data) or 'nothing'}"
    # Of what a key may be, every kind of value is a mistake of its own.
    path = _path(mistakes[0], data, within)
    alternatives = dict.fromkeys(describe_mistake(each) for each in mistakes if _path(each, data, within) == path)
    if not path:  # from a rule about several keys, which names them itself
        return next(iter(alternatives))
    return f"{_dotted(path)}: {' or '.join(alternatives)}, found {brief(mistakes[0]['input'])}"


def brief(value: Any) -> str:
    """A value as a message shows it: at most 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _dotted(path: Sequence[str | int]) -> str:
    return ".".join(map(str, path))


def _path(mistake: ErrorDetails, data: Any, within: Sequence[str]) -> list[str | int]:
    """As far as it leads into the file: what follows names alternatives of pydantic's."""
    path: list[str | int] = []
    for part in mistake["loc"][len(within) :]:
        try:
            data = data[part]
        except (KeyError, IndexError, TypeError):
            break
        path.append(part)
    return path


def _fields_at(model: type[BaseModel], path: Sequence[str | int]) -> Sequence[str]:
    """Names of the keys that stand together at a place of a file."""
    for part in path:
        if part in model.model_fields:
            nested = _models_in(model.model_fields[part].annotation)
            if not nested:
                return ()
            model = nested[0]
    return tuple(model.model_fields)


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for each in get_args(annotation) for model in _models_in(each)]
