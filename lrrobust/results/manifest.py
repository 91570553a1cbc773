"""What a manifest holds, as far as it is read back: one that comes from elsewhere is checked before anybody relies on it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from lrrobust.errors import StoreError
from lrrobust.mistakes import describe_mistake
from lrrobust.results.files import explaining, read_file
from lrrobust.results.schema import NORMS, SCHEMA_VERSION

MANIFEST_NAME = "manifest.json"

#: Names of attacks are part of file names.
ATTACK_NAME = r"[A-Za-z0-9_][A-Za-z0-9_.+-]*"

#: Keys that decide the rows: what the fingerprint of an evaluation covers, as far as they are there.
IDENTITY_KEYS = (
    "schema_version",
    "rows_version",
    "model",
    "surrogate",
    "dataset",
    "attacks",
    "plan",
    "seed",
    "precision",
    "real_pixels",
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


class _Request(_Some):
    models: list[str] = []
    weights: list[str] | None = None
    surrogates: list[str] | None = None

    @model_validator(mode="after")
    def _check_weights(self) -> _Request:
        if self.weights and len(self.weights) != len(self.models):
            raise PydanticCustomError("weights", "expected weights for each of the models, or none")
        return self


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
    request: _Request | None = None
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


def load_manifest(folder: Path) -> dict[str, Any]:
    """What a run says of itself; StoreError where there is none, or it is damaged."""
    path = folder / MANIFEST_NAME
    try:
        with explaining("read", path):
            manifest = parse_manifest(read_file(path))
    except FileNotFoundError:
        raise StoreError(f"expected a run in {folder}, found no {MANIFEST_NAME}: give the folder of a run") from None
    except ValueError as error:
        raise StoreError(
            f"{path} is damaged ({error}); restore it from a copy, or choose another folder to start anew"
        ) from None
    if manifest["schema_version"] != SCHEMA_VERSION:
        raise StoreError(
            f"{folder} has results of schema {manifest['schema_version']}, this lrrobust reads {SCHEMA_VERSION}: "
            "use the version of lrrobust that wrote it, or choose another folder"
        )
    # Others than evaluations choose their fingerprints themselves.
    if "rows_version" in manifest and manifest["fingerprint"] != fingerprint_of(identity_of(manifest)):
        raise StoreError(
            f"{path} was edited: what it says does not have the fingerprint that it names; restore it from a copy, or "
            "evaluate anew in another folder"
        )
    return manifest


def fingerprint_of(identity: dict[str, Any]) -> str:
    """sha256 of a JSON-ready identity, independent of the order of its keys."""
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
