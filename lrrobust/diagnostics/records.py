"""What was found out about a run's attacks, as a file beside its manifest; needs no torch."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lrrobust.mistakes import describe_mistake
from lrrobust.norm import Norm
from lrrobust.results import Run, write_file
from lrrobust.results.files import read_file

#: File beside a run's manifest that holds the JSON of `Diagnostics`.
DIAGNOSTICS_FILE = "diagnostics.json"

#: Raised with every change that makes the same run be diagnosed differently: files of other versions count as none.
DIAGNOSTICS_VERSION = 12

_ANEW = "the same eval command, without --no-diagnostics, makes them anew"


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

    @property
    def doubt(self) -> str | None:
        """What checks that failed say of the run's robust accuracies; None where none has failed."""
        failed = [result.name for result in self.results if result.passed is False]
        if not failed:
            return None
        which = ", ".join(dict.fromkeys(failed))
        return f"{len(failed)} of {len(self.results)} checks failed ({which}): robust accuracies may be too high"


class _Versioned(BaseModel):
    """What is read of a file before its version is known."""

    version: int = DIAGNOSTICS_VERSION


def load_diagnostics(run: Run) -> Diagnostics | None:
    """What is known of whether the attacks of a run worked; None where nothing was looked for, or what was found cannot
    count: see `why_uncounted`."""
    return _read(run)[0]


def why_uncounted(run: Run) -> str | None:
    """What is to be said of a file beside a run that counts as none: of another version or run, or damaged; else None."""
    return _read(run)[1]


def _read(run: Run) -> tuple[Diagnostics | None, str | None]:
    try:
        text = read_file(run.folder / DIAGNOSTICS_FILE)
        version = _Versioned.model_validate_json(text).version
        if version != DIAGNOSTICS_VERSION:
            reason = f"its diagnostics are of version {version}, and only those of version {DIAGNOSTICS_VERSION} count"
            return None, f"{reason}: {_ANEW}"
        found = Diagnostics.model_validate_json(text)
        if found.fingerprint == run.manifest.get("fingerprint"):
            return found, None
        reason = "it was computed for another run"
    except FileNotFoundError:
        return None, None
    except ValidationError as error:
        reason = describe_mistake(error.errors(include_url=False)[0])
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
    return None, f"its {DIAGNOSTICS_FILE} cannot be read ({reason}) and counts as none: {_ANEW}"


def write_diagnostics(run: Run, diagnostics: Diagnostics) -> None:
    """Puts the file beside the run's manifest, whole or not at all.

    Raises:
        StoreError: the disk is full or does not let us write.
    """
    write_file(run.folder / DIAGNOSTICS_FILE, diagnostics.model_dump_json(indent=2).encode())
