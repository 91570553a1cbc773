"""From names and YAML files to checked attacks.

A file holds one attack (`kind: pgd`, ...) or a suite:

    kind: suite
    description: what it is for
    attacks: [fgsm, pgd, my_pgd.yaml]   # shipped names, or paths relative to this file
    survivors_only: true                # optional: attack only what the attacks before left standing

Configurations are data from anywhere: they are parsed as plain data, in bounded size, can name no
Python file, and every mistake is a `ConfigError` that names the file and the key.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args

from pydantic import Field, TypeAdapter, ValidationError

from lrrobust.attacks.custom import CustomAttack, check_custom, load_custom
from lrrobust.attacks.specs import AttackSpec, CustomSpec, Description, Precision
from lrrobust.config_file import Settings, is_path, read_mapping
from lrrobust.eps import write_eps
from lrrobust.errors import ConfigError, UnknownNameError
from lrrobust.mistakes import brief, explain_mistakes

_log = logging.getLogger(__name__)

_ATTACK: TypeAdapter[AttackSpec] = TypeAdapter(AttackSpec)
_SPEC_CLASSES = {get_args(spec.model_fields["kind"].annotation)[0]: spec for spec in get_args(get_args(AttackSpec)[0])}
_KINDS = (*_SPEC_CLASSES, "suite")

#: What other libraries and papers call them, without hyphens.
_CALLED_ELSEWHERE = {
    "autoattack": "the suite strong (strong_l2 in l2, strong_l1 in l1)",
    "aa": "the suite strong (strong_l2 in l2, strong_l1 in l1)",
    "bim": "pgd", "ifgsm": "pgd", "pgd20": "pgd",
    "pgdl2": "pgd_l2", "mifgsm": "mi_fgsm", "carliniwagner": "cw", "cwl2": "cw", "cwlinf": "pgd_margin",
    "apgd": "apgd_ce", "l1apgd": "apgd_ce_l1",
    "apgddlr": "apgd_t", "apgdt": "apgd_t", "fab": "fab_t",
    "hsj": "hop_skip_jump", "hsja": "hop_skip_jump", "hopskipjump": "hop_skip_jump", "boundary": "hop_skip_jump",
}  # fmt: skip


class _Suite(Settings):
    kind: Literal["suite"]
    description: Description = ""
    attacks: Annotated[tuple[str, ...], Field(min_length=1)]
    #: Sets `survivors_only` in every attack of the suite that was not given before it.
    survivors_only: bool = False


class AttackListing(NamedTuple):
    """One line of the list of shipped configurations; a suite's norm joins those of its attacks."""

    name: str
    kind: str
    norm: str
    description: str


def load_suite(
    names: Sequence[str | Path | CustomAttack],
    *,
    eps: Sequence[float | str] | None = None,
    steps: int | None = None,
    restarts: int | None = None,
    precision: Precision | None = None,
    eot_iter: int | None = None,
) -> tuple[AttackSpec, ...]:
    """Load attacks and suites, in the order given, each attack once.

    Args:
        names: shipped names ("pgd", "standard") or YAML files. A string is a file if it ends in
            .yaml or .yml, or contains a path separator. And attacks of one's own, in Python or as
            "path/to/file.py:attack", which runs the file.
        eps, steps, restarts, precision, eot_iter: replace these settings in every attack that has them; those that have not
            stay as they are. Budgets are in pixel units of [0, 1], or strings such as "8/255".

    Raises:
        ConfigError: a file cannot be read or is wrong, two files share a name, a suite includes
            itself, no attack has a setting that is to be replaced, or its new value is not valid.
        UnknownNameError: no such attack or suite is shipped.
    """
    if not names:
        raise ConfigError(f"no attack given; shipped: {', '.join(sorted(_shipped()))}")
    found: dict[Path, AttackSpec] = {}
    read_suites: set[Path] = set()
    for name in names:
        if isinstance(name, CustomAttack) or ".py:" in str(name):
            spec = name.spec() if isinstance(name, CustomAttack) else load_custom(str(name))
            if spec.name in _shipped() or any(spec.name == other.name for other in found.values()):
                raise ConfigError(f"custom attack {spec.name!r}: expected a name that no other attack has; give another name=")
            found[Path(f"{spec.name}.py")] = spec
        else:
            _collect(_locate(name, relative_to=Path()), found, read_suites, including=())
    specs = tuple(found.values())
    _check_names_differ(found)
    if eps is not None and len({spec.norm for spec in specs}) > 1:
        raise ConfigError(
            "eps cannot be replaced in attacks of several norms at once"
            f" ({', '.join(f'{spec.name}: {spec.norm}' for spec in specs)}); evaluate each norm by itself"
        )
    given = {"eps": eps and list(eps), "steps": steps, "restarts": restarts, "precision": precision, "eot_iter": eot_iter}
    changes = {key: value for key, value in given.items() if value is not None}
    for key in changes:
        without = ", ".join(spec.name for spec in specs if key not in type(spec).model_fields)
        if not any(key in type(spec).model_fields for spec in specs):
            raise ConfigError(f"{without}: no {key!r} to replace; leave this setting out")
        if without:
            _log.warning("%s: left as it is in what has no such setting: %s", key, without)
    return tuple(_override(spec, changes) for spec in specs)


def _override(spec: AttackSpec, changes: Mapping[str, Any]) -> AttackSpec:
    """A spec with some settings replaced and checked again, as far as attacks of its kind have them."""
    changes = {key: value for key, value in changes.items() if key in type(spec).model_fields}
    if not changes:
        return spec
    settings = {**spec.model_dump(mode="json"), **changes}
    if isinstance(spec, CustomSpec):
        return check_custom({**settings, "passes": spec.passes}, spec.propose)
    return _validate(settings, _ATTACK, source=spec.name)


def read_settings(name: str | Path) -> dict[str, Any]:
    """All settings of one attack, defaults included, or the content of a suite, as a file of one's own would say them.

    Args:
        name: as in `load_suite`.

    Raises:
        ConfigError, UnknownNameError: as `load_suite`.
    """
    path = _locate(name, relative_to=Path())
    data = _read_mapping(path)
    specs = load_suite([name])
    if data["kind"] == "suite":
        return data
    # A file has no name in it; what came later is left out where it has its default.
    settings = specs[0].model_dump(mode="json", exclude={"name"}) | {"eot_iter": specs[0].eot_iter}
    settings["eps"] = [write_eps(eps) for eps in specs[0].eps]
    first = {key: settings.pop(key) for key in ("kind", "description", "norm", "eps")}
    return first | settings


def list_attacks() -> list[AttackListing]:
    """The shipped attacks and suites, attacks first, each group by name."""
    listing = []
    for name, path in _shipped().items():
        data = _read_mapping(path)
        specs = load_suite([name])
        norms = dict.fromkeys(spec.norm for spec in specs)
        listing.append(AttackListing(name, data["kind"], ", ".join(norms), data.get("description", "")))
    return sorted(listing, key=lambda line: (line.kind == "suite", line.name))


@cache
def _shipped() -> dict[str, Path]:
    """Shipped configurations by name."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "attacks_configs", package.parent / "attacks_configs"):  # wheel, checkout
        if folder.is_dir():
            return {path.stem: path for path in sorted(folder.glob("*.yaml"))}
    raise ConfigError(f"attacks_configs: expected this folder in {package} or beside it; install lrrobust again")


def _locate(name: str | Path, relative_to: Path) -> Path:
    """The file that a shipped name or a path stands for."""
    text = str(name)
    if isinstance(name, Path) or is_path(text):
        try:
            return (relative_to / name).resolve()
        except (OSError, RuntimeError, ValueError):  # loops of links; zero bytes
            raise ConfigError(f"{text!r}: expected the path of a YAML file") from None
    if text not in _shipped():
        beside = next((name for name in (f"{text}.yaml", f"{text}.yml", text) if os.path.isfile(relative_to / name)), None)
        if beside is not None:
            raise ConfigError(
                f"unknown attack or suite {text!r}: a file is given with its ending .yaml or .yml, found {beside}"
            )
        if (ours := _CALLED_ELSEWHERE.get(text.lower().replace("-", "").replace("_", ""))) is not None:
            raise ConfigError(f"unknown attack or suite {text!r}: what others call so is {ours} here")
        raise UnknownNameError("attack or suite", text, _shipped(), "a YAML file")
    return _shipped()[text]


def _collect(path: Path, found: dict[Path, AttackSpec], read_suites: set[Path], including: tuple[Path, ...]) -> None:
    """Add the attacks that `path` holds to `found`; `including` are the suites that led here."""
    if path in including:
        chain = " -> ".join(_display(suite) for suite in (*including[including.index(path) :], path))
        raise ConfigError(f"{_display(path)}: attacks: a suite cannot include itself ({chain})")
    if path in found or path in read_suites:
        return
    data = _read_mapping(path)
    if data["kind"] == "suite":
        suite = _validate(data, TypeAdapter(_Suite), source=_display(path))
        for name in suite.attacks:
            if ".py:" in name:
                raise ConfigError(f"{_display(path)}: attacks: {name!r}: no suite runs a Python file; give it as --attack")
            try:
                target = _locate(name, relative_to=path.parent)
            except (ConfigError, UnknownNameError) as error:
                raise ConfigError(f"{_display(path)}: attacks: {error}") from None
            before = set(found)
            _collect(target, found, read_suites, (*including, path))
            if suite.survivors_only:
                for added in set(found) - before:
                    found[added] = found[added].model_copy(update={"survivors_only": True})
        read_suites.add(path)
        return
    if "name" in data:
        raise ConfigError(f"{_display(path)}: name: unexpected key, an attack is named after its file")
    found[path] = _validate({**data, "name": path.stem}, _ATTACK, source=_display(path))


def _check_names_differ(found: dict[Path, AttackSpec]) -> None:
    first: dict[str, Path] = {}
    for path, spec in found.items():
        other = first.setdefault(spec.name, path)
        if other != path:
            raise ConfigError(f"{path}: an attack called {spec.name!r} was already given by {other}; rename one")


def _display(path: Path) -> str:
    """How messages call a file: shipped ones by name, others relative to where the user is."""
    if path in _shipped().values():
        return path.name
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def _read_mapping(path: Path) -> dict[str, Any]:
    """Read a file as a mapping with a known `kind`."""
    source = _display(path)
    data = read_mapping(path, source, example="kind: pgd")
    kind = data.get("kind")
    if kind not in _KINDS:
        found = f"found {brief(kind)}" if "kind" in data else "found no such key"
        raise ConfigError(f"{source}: kind: expected one of {', '.join(_KINDS)}, {found}")
    return data


def _validate(data: dict[str, Any], adapter: TypeAdapter[Any], source: str) -> Any:
    """Check plain data against a model; the first mistake becomes the message."""
    try:
        # Through JSON, as strict models take JSON's lists for tuples but not Python's.
        text = json.dumps(data)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{source}: expected text, numbers, true, false and lists: {error}") from None
    try:
        return adapter.validate_json(text)
    except ValidationError as error:
        kind = data["kind"]
        # The union of attacks puts the kind in front of every path.
        within = (kind,) if kind in _SPEC_CLASSES else ()
        told = explain_mistakes(error, data, _SPEC_CLASSES.get(kind, _Suite), within, given=["name"])
        raise ConfigError(f"{source}: {told}") from None
