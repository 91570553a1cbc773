"""What a manifest holds, as far as it is read back: one that comes from elsewhere is checked before anybody relies on it."""

from __future__ import annotations

import json
from typing import Annotated, Any, Optional

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, StrictInt, StrictStr, ValidationError

from lrrobust.results.schema import NORMS

#: Names of attacks are part of file names.
ATTACK_NAME = r"[A-Za-z0-9_][A-Za-z0-9_.+-]*"

_AttackName = Annotated[str, Field(pattern=f"^{ATTACK_NAME}$", max_length=200)]
_Names = Optional[list[StrictStr]]


class _Some(BaseModel):
    # Manifests of tests and of later versions may hold less and more: what is there must be what it is called.
    model_config = ConfigDict(extra="allow", strict=True)


class _Attack(_Some):
    name: _AttackName
    norm: Annotated[Optional[str], Field(pattern=f"^({'|'.join(NORMS)})$")] = None
    kind: Optional[str] = None


class _Plan(_Some):
    parts: list[tuple[_AttackName, NonNegativeInt, NonNegativeInt]] = []


class _Model(_Some):
    name: Optional[str] = None
    weights: Optional[str] = None
    state_sha256: Optional[str] = None
    code_sha256: Optional[str] = None
    num_classes: Optional[int] = None
    input_size: Optional[int] = None


class _Dataset(_Some):
    name: Optional[str] = None
    sha256: Optional[str] = None
    n: Annotated[Optional[int], Field(ge=1, le=10**9)] = None


class _Provenance(_Some):
    versions: Optional[dict[str, Any]] = None
    commit: Optional[str] = None
    device: Optional[str] = None


class _Manifest(_Some):
    schema_version: StrictInt
    fingerprint: Annotated[str, Field(pattern="^[0-9a-f]{8,}$")]
    plan: _Plan = _Plan()
    attacks: list[_Attack] = []
    model: Optional[_Model] = None
    dataset: Optional[_Dataset] = None
    provenance: Optional[_Provenance] = None
    class_names: _Names = None
    command: _Names = None
    created_at: Optional[str] = None
    sessions: list[dict[str, Any]] = []


def parse_manifest(content: bytes) -> dict[str, Any]:
    """The manifest as it was written.

    Raises:
        ValueError: it is no JSON, or what it holds is not what its keys say; one line.
    """
    try:
        manifest = json.loads(content)
        # Halves of surrogate pairs pass for text until somebody writes them.
        text = json.dumps(manifest, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except UnicodeError:
        raise ValueError("it is not UTF-8") from None
    try:
        _Manifest.model_validate_json(text)
    except ValidationError as error:
        mistake = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part)[:40] for part in mistake["loc"])
        raise ValueError(f"{where}: {' '.join(mistake['msg'].split())[:200]}".removeprefix(": ")) from None
    return manifest
