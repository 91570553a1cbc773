"""Configuration files: YAML read as plain data, in bounded size, every mistake one line."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from lrrobust.errors import ConfigError, UnknownNameError
from lrrobust.mistakes import brief, explain_mistakes

Model = TypeVar("Model", bound=BaseModel)

#: A configuration is a page of text; YAML parses about 1 MB in ten seconds.
MAX_FILE_BYTES = 64 * 1024


class Settings(BaseModel):
    """Base of what files say: frozen, and strict, so that `steps: true` is not 1 and no key is too many."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class _PlainLoader(yaml.SafeLoader):
    """YAML without what a configuration has no use for: repeated keys, anchors, aliases, merges, numbers to other bases.

    PyYAML lets the last of several equal keys win, silently; aliases can blow a few lines up to
    gigabytes; and 010 is 8 to it, 1:30 is 90.
    """

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if getattr(event, "anchor", None) is not None:  # of an alias too
            raise yaml.composer.ComposerError(None, None, "anchors and aliases are not allowed", event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag != "tag:yaml.org,2002:str":
                raise yaml.constructor.ConstructorError(None, None, "keys must be plain words", key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} is repeated", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_scalar(self, node: yaml.Node) -> Any:
        value = super().construct_scalar(node)
        if any("\ud800" <= letter <= "\udfff" for letter in value):
            reason = f"{brief(value)}, which has half a character in it"
            raise yaml.constructor.ConstructorError(None, None, reason, node.start_mark)
        return value

    def construct_number(self, node: yaml.ScalarNode) -> int | float:
        is_whole = node.tag == "tag:yaml.org,2002:int"
        if ":" in node.value or (is_whole and not re.fullmatch(r"[-+]?(0|[1-9][0-9]*)", node.value)):
            reason = f"{node.value}, which is no plain decimal number: write its digits alone, or quote it"
            raise yaml.constructor.ConstructorError(None, None, reason, node.start_mark)
        return self.construct_yaml_int(node) if is_whole else self.construct_yaml_float(node)


_PlainLoader.add_constructor("tag:yaml.org,2002:int", _PlainLoader.construct_number)
_PlainLoader.add_constructor("tag:yaml.org,2002:float", _PlainLoader.construct_number)
# Numbers in everybody's eyes, but texts in YAML 1.1, which asks for a point and a sign: 1e-3, 2.5e4.
_EXPONENT = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$")
_PlainLoader.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+0123456789"))


def locate(kind: str, name_or_path: str | Path, folder: Path) -> Path:
    """The file of a shipped configuration by its name, or the user's own.

    Args:
        kind: what messages call such a configuration.
        folder: of the shipped ones.

    Raises:
        UnknownNameError: neither a shipped name nor a file, and not written like the path of one.
    """
    shipped = {path.stem: path for path in folder.glob("*.yaml")}
    text = str(name_or_path)
    path = shipped.get(text, Path(name_or_path))
    # What was meant as a path and is not there, `read_mapping` says.
    if not path.is_file() and not (isinstance(name_or_path, Path) or is_path(text)):
        raise UnknownNameError(kind, text, shipped, "a YAML file")
    return path


def is_path(text: str) -> bool:
    """Whether something on the command line means a file of the user's rather than a shipped name."""
    return text.endswith((".yaml", ".yml")) or "/" in text or "\\" in text


def read_mapping(path: Path, source: str, example: str) -> dict[str, Any]:
    """The keys and values of a YAML file.

    Args:
        path: the file.
        source: how messages call it.
        example: a line such a file may hold, for the message where it holds none.

    Raises:
        ConfigError: the file cannot be read, is too large, or is not a mapping of plain words.
    """
    try:
        if not path.is_file():
            found = "a folder" if path.is_dir() else "a pipe or a device" if path.exists() else "no such file"
            raise ConfigError(f"{source}: expected a YAML file, found {found}")
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{source}: cannot be read: {error.strerror}") from None
    if len(content) > MAX_FILE_BYTES:
        raise ConfigError(f"{source}: expected at most {MAX_FILE_BYTES} bytes, found more")
    try:
        data = yaml.load(content.decode("utf-8"), Loader=_PlainLoader)
    except UnicodeDecodeError as error:
        found = f"byte {content[error.start]:#04x} at {error.start}"
        raise ConfigError(f"{source}: expected UTF-8 text, found {found}") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        found = re.sub("^(but )?found ", "", error.problem or "something else")
        raise ConfigError(f"{source}: expected YAML, found {found}{where}") from None
    # Characters that YAML forbids; values such as the 31st of February; nesting thousands deep.
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = "nesting too deep" if isinstance(error, RecursionError) else str(error).splitlines()[0]
        raise ConfigError(f"{source}: expected YAML, found {reason}") from None
    if not isinstance(data, dict):
        found = "an empty file" if data is None else brief(data)
        raise ConfigError(f"{source}: expected keys and values, such as '{example}', found {found}")
    return data


def check_keys(data: dict[str, Any], model: type[Model], source: str, given: Sequence[str] = ()) -> Model:
    """The keys and values of a file as a model that forbids unknown keys; those `given` are no part of the file.

    Raises:
        ConfigError: names the file, the key, what was expected and what was found.
    """
    try:
        # Through JSON, because pydantic's strict mode takes lists for tuples there only. What JSON has not,
        # such as dates, goes in as text.
        return model.model_validate_json(json.dumps(data, default=str))
    except ValidationError as error:
        raise ConfigError(f"{source}: {explain_mistakes(error, data, model, given=given)}") from None
