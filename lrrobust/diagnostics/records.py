"""What was found out about a run's attacks, as a file beside its manifest; needs no torch."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lrrobust.errors import StoreError
from lrrobust.mistakes import describe_mistake
from lrrobust.norm import Norm
from lrrobust.results import Run, write_file
from lrrobust.results.files import read_file

#: File beside a run's manifest that holds the JSON of `Diagnostics`.
DIAGNOSTICS_FILE = "diagnostics.json"

#: Raised with every change that makes the same run be diagnosed differently: files of other versions count as none.
DIAGNOSTICS_VERSION = 10


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Diagnostic(_Record):
    """One check of whether an attack on one model worked, computed by an evaluation and kept beside its rows."""

    name: str = Field(pattern=r"^[a-z0-9_]+$")
    """Such as `zero_gradient`."""
    passed: bool | None
    """None: could not be said, and `detail` says why."""
    detail: str
    """One sentence with the numbers, and what they mean."""
    attack: str | None = None
    """The attack concerned; None: the model, or all attacks of a norm."""
    norm: Norm | None = None
    """Of the attacks concerned; None: the model."""


class Diagnostics(_Record):
    """Everything found out about one run."""

    version: int = DIAGNOSTICS_VERSION
    fingerprint: str
    """Of the run."""
    sample: tuple[int, ...]
    """Places in the data set (column `index` of the rows) of the images that were attacked once more."""
    wall_s: float = Field(ge=0)
    """Seconds that it took."""
    results: tuple[Diagnostic, ...]


class _Versioned(BaseModel):
    """What is read of a file before its version is known."""

    version: int = DIAGNOSTICS_VERSION


def load_diagnostics(run: Run) -> Diagnostics | None:
    """What is known of whether the attacks of a run worked; None where nothing was looked for, or by another version's rules.

    See `other_rules` for the latter.

    Raises:
        StoreError: the file of diagnostics is damaged, or of another run.
    """
    path = run.folder / DIAGNOSTICS_FILE
    try:
        text = read_file(path)
        if _Versioned.model_validate_json(text).version != DIAGNOSTICS_VERSION:
            return None
        found = Diagnostics.model_validate_json(text)
        if found.fingerprint != run.manifest.get("fingerprint"):
            raise ValueError("it was computed for another run")
        return found
    except FileNotFoundError:
        return None
    except ValidationError as error:
        reason = describe_mistake(error.errors(include_url=False)[0])
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
    raise StoreError(f"{path} cannot be read ({reason}): restore it, or delete it and run the same command again")


def other_rules(run: Run) -> str | None:
    """What is to be said of a file of another version beside a run, which counts as none; None where there is none."""
    try:
        version = _Versioned.model_validate_json(read_file(run.folder / DIAGNOSTICS_FILE)).version
    except (OSError, ValidationError):
        return None
    if version == DIAGNOSTICS_VERSION:
        return None
    return (
        f"its diagnostics are of version {version}, and only those of version {DIAGNOSTICS_VERSION} count: the same eval "
        "command, without --no-diagnostics, makes them anew"
    )


def write_diagnostics(run: Run, diagnostics: Diagnostics) -> None:
    """Puts the file beside the run's manifest, whole or not at all.

    Raises:
        StoreError: the disk is full or does not let us write.
    """
    write_file(run.folder / DIAGNOSTICS_FILE, diagnostics.model_dump_json(indent=2).encode())
