"""What a manifest holds, as far as it is read back: one that comes from elsewhere is checked before anybody relies on it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lrrobust.mistakes import describe_mistake
from lrrobust.results.schema import NORMS

#: Names of attacks are part of file names.
ATTACK_NAME = r"[A-Za-z0-9_][A-Za-z0-9_.+-]*"

#: Keys that decide the rows: what the fingerprint of an evaluation covers, as far as they are there.
IDENTITY_KEYS = (
    "schema_version", "rows_version", "model", "surrogate", "dataset", "attacks", "plan", "seed", "precision", "real_pixels",
)

_AttackName = Annotated[str, Field(pattern=f"^{ATTACK_NAME}$", max_length=200)]
_Place = Annotated[int, Field(ge=0, lt=10**12)]


class _Some(BaseModel):
    # Older and later versions write less and more, so nothing is required here; what is there must be what it is called.
    model_config = ConfigDict(extra="allow", strict=True)


class _Attack(_Some):
    name: _AttackName
    norm: Literal[NORMS]


class _Plan(_Some):
    parts: list[tuple[_AttackName, _Place, _Place]] = []


class _Model(_Some):
    name: str = ""
    weights: str | None = None
    state_sha256: str | None = None
    code_sha256: str | None = None
    input_size: Annotated[int, Field(ge=1, le=10**6)] | None = None


class _Dataset(_Some):
    name: str = ""
    sha256: str = ""
    n: Annotated[int, Field(ge=0, lt=10**12)] = 0


class _Provenance(_Some):
    versions: dict[str, str | None] | None = None
    commit: str | None = None
    device: str | None = None


class _Manifest(_Some):
    schema_version: int
    fingerprint: Annotated[str, Field(pattern="^[0-9a-f]{8,}$")]
    plan: _Plan = _Plan()
    attacks: list[_Attack] = []
    model: _Model = _Model()
    surrogate: _Model | None = None
    dataset: _Dataset = _Dataset()
    real_pixels: Literal["judged", "saved"] | None = None
    provenance: _Provenance | None = None
    class_names: list[str] | None = None
    request: dict[str, Any] | None = None
    position: Annotated[int, Field(ge=0)] = 0
    command: list[str] | None = None
    created_at: str | None = None
    sessions: list[dict[str, Any]] = []


def identity_of(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The part of an evaluation's manifest that its fingerprint covers."""
    return {key: manifest[key] for key in IDENTITY_KEYS if key in manifest}


def parse_manifest(content: bytes) -> dict[str, Any]:
    """The manifest as it was written.

    Raises:
        ValueError: it is no JSON, or what it holds is not what its keys say; one line.
    """
    try:
        manifest = json.loads(content)
        # Halves of surrogate pairs pass for text until somebody writes them.
        text = json.dumps(manifest, ensure_ascii=False, allow_nan=False).encode()
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except UnicodeError:
        raise ValueError("it is not UTF-8") from None
    try:
        _Manifest.model_validate_json(text)
    except ValidationError as error:
        mistake = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part)[:40] for part in mistake["loc"])
        raise ValueError(" ".join(f"{where}: {describe_mistake(mistake)}".removeprefix(": ").split())[:250]) from None
    return manifest
