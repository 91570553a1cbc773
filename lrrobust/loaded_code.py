"""The code of functions as it is loaded, which no comment changes and a cell of a notebook has too."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterator
from functools import partial
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch

_PLAIN = (bool, int, float, complex, str, bytes, type(None))


def code_of(function: FunctionType) -> str:
    """Its bytecode and defaults; what it calls elsewhere is not seen."""
    return f"{_of_bytecode(function.__code__)} {function.__defaults__!r} {function.__kwdefaults__!r}"


def describe_callable(function: Any) -> str:
    """The code of anything that can be called, and code and values of what it holds and of globals that it names, and so on.

    Of modules, and of what Python and packages bring, names are seen, and of objects of theirs numbers, texts and parameters.
    """
    found, said, places = [function], [], {id(function): 0}

    def mention(value: Any) -> str:
        if isinstance(value, _PLAIN):
            return repr(value)
        place = places.setdefault(id(value), len(found))
        if place == len(found):
            found.append(value)
        return f"#{place}"

    for value in found:  # which grows: functions may call each other in a circle
        said.append(f"{type(value).__qualname__} {_describe(value, mention)}")
    return "\n".join(said)


def _describe(value: Any, mention: Callable[[Any], str]) -> str:
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().clone(memory_format=torch.contiguous_format).flatten().view(torch.uint8).numpy()
    if isinstance(value, (np.ndarray, np.generic)):
        return hashlib.sha256(value.tobytes()).hexdigest()
    if isinstance(value, (set, frozenset)):
        return _of_constant(frozenset(value))
    if isinstance(value, ModuleType) or isinstance(value, (type, FunctionType)) and _is_installed(value):
        return value.__name__
    return str([mention(part) for part in _parts(value)])


def _parts(value: Any) -> list[Any]:
    if isinstance(value, (list, tuple, dict)):
        return [*value, *(value.values() if isinstance(value, dict) else ())]
    if isinstance(value, MethodType):
        return [value.__func__, value.__self__]
    if isinstance(value, partial):
        return [value.func, value.args, value.keywords]
    if isinstance(value, FunctionType):
        named = [value.__globals__[name] for name in _names(value.__code__) if name in value.__globals__]
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        return [_of_bytecode(value.__code__), value.__defaults__, value.__kwdefaults__, *cells, *named]
    if isinstance(value, type):
        own = [each for name, each in vars(value).items() if callable(each) or not name.startswith("__")]
        return [*value.__bases__, *(getattr(each, "__func__", getattr(each, "fget", each)) for each in own)]
    # In which mode a module is makes no difference.
    kinds = _PLAIN if _is_installed(type(value)) else object
    held = {name: each for name, each in getattr(value, "__dict__", {}).items() if isinstance(each, kinds)} | {"training": 0}
    state = value.state_dict() if isinstance(value, torch.nn.Module) else None
    return [type(value), getattr(value, "__qualname__", None), held, state]


def _is_installed(code: type | FunctionType) -> bool:
    top = str(code.__module__).partition(".")[0]
    file = getattr(sys.modules.get(top), "__file__", None) or ""
    return top in (*sys.stdlib_module_names, "lrrobust") or ("-packages" in file and top != "__main__")


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _of_bytecode(code: CodeType) -> str:
    return f"{code.co_code.hex()} {code.co_names} {[_of_constant(each) for each in code.co_consts]}"


def _of_constant(constant: Any) -> str:
    if isinstance(constant, CodeType):
        return _of_bytecode(constant)
    # In an order that is the same in every process.
    return str(sorted(map(repr, constant))) if isinstance(constant, frozenset) else repr(constant)
