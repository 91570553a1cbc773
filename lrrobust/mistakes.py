"""What pydantic found wrong in a file, in one line and in the words of the file."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, get_args

from pydantic import BaseModel, ValidationError

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

#: Kind of mistake -> what was expected; what stands in braces the mistake says.
_EXPECTED = {
    "bool_type": "true or false",
    "dict_type": "keys and values, as in {{a: 1}}",
    "finite_number": "a finite number",
    "float_type": "a number",
    "greater_than": "more than {gt}",
    "greater_than_equal": "at least {ge}",
    "int_from_float": "a whole number",
    "int_type": "a whole number",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "list_type": "a list, as in [a, b]",
    "literal_error": "{expected}",
    "missing": "this key",
    "model_type": "keys and values, as in {{a: 1}}",
    "string_pattern_mismatch": "text that matches {pattern}",
    "string_too_long": "a text of at most {max_length} letters",
    "string_too_short": "a longer text",
    "string_type": "text",
    "too_short": "a longer list",
    "tuple_type": "a list, as in [a, b]",
}


def describe_mistake(mistake: ErrorDetails) -> str:
    """One of `ValidationError.errors()` as what was expected, without where it was made."""
    expected = _EXPECTED.get(mistake["type"])
    limits = {key: _plain(value) for key, value in mistake.get("ctx", {}).items()}
    if expected is not None:
        # What pydantic says of a kind may change with its version: then in its own words.
        with suppress(KeyError):
            return f"expected {expected.format(**limits)}"
    return " ".join(mistake["msg"].replace("Input should be", "expected").split())


def _plain(limit: Any) -> Any:
    """1 instead of 1.0."""
    return int(limit) if isinstance(limit, float) and limit.is_integer() else limit


def explain_mistakes(
    error: ValidationError,
    data: Mapping[str, Any],
    model: type[BaseModel],
    within: Sequence[str] = (),
    given: Sequence[str] = (),
) -> str:
    """The line that explains most of what is wrong: an unknown key before missing ones, which it may stand for.

    Args:
        error: of validating `data`.
        data: what the file holds, and what is `given` beside.
        model: what it should hold, for the names of its keys.
        within: what pydantic puts before the path of every key, such as the tag of a union.
        given: keys that are no part of the file.
    """
    mistakes = error.errors(include_url=False)
    unknown = next((each for each in mistakes if each["type"] == "extra_forbidden"), None)
    if unknown is not None:
        *where, key = unknown["loc"][len(within) :]
        known = sorted(set(_fields_at(model, where)) - set(given))
        near = difflib.get_close_matches(str(key), known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(known)}"
        return f"{dotted([*where, key])}: unknown key, {hint}"
    missing = [each["loc"][len(within) :] for each in mistakes if each["type"] == "missing"]
    if missing:
        # All at once: who writes a file would otherwise meet them one by one.
        present = [str(key) for key in _value_at(data, missing[0][:-1]) if key not in given]
        return f"expected also {', '.join(map(dotted, missing))}, found only {', '.join(present) or 'nothing'}"
    # Of what a key may be, every kind of value is a mistake of its own.
    path = _path(mistakes[0], data, within)
    alternatives = dict.fromkeys(describe_mistake(each) for each in mistakes if _path(each, data, within) == path)
    if not path:  # from a rule about several keys, which names them itself
        return next(iter(alternatives))
    first, *others = alternatives
    expected = " or ".join([first, *(other.removeprefix("expected ") for other in others)])
    return f"{dotted(path)}: {expected}, found {brief(mistakes[0]['input'])}"


def brief(value: Any) -> str:
    """A value as a message shows it: at most 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def dotted(path: Sequence[str | int]) -> str:
    """A path as messages show it, in one line; an empty key in quotes."""
    return " ".join(".".join(str(part) or "''" for part in path).split())


def _value_at(data: Any, path: Sequence[str | int]) -> Any:
    for part in path:
        data = data[part]
    return data


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
