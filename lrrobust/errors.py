"""The errors a user can cause or mend.

Every one carries a single line that says what was expected, what was found and what to do. The
command line prints that line and exits with code 2; anything else is a defect and keeps its
traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LrRobustError(Exception):
    """Base of all errors whose message is meant for the user."""


class ConfigError(LrRobustError):
    """A configuration file or a command-line value is not what it must be."""


class DataError(LrRobustError):
    """Images cannot be found, fetched, read or matched with the classes of the model."""


class ModelError(LrRobustError):
    """A model cannot be built, or does not behave like a classifier of images in [0, 1]."""


class WeightsError(LrRobustError):
    """A file of weights is missing, damaged, or made for another network."""


class BackendError(LrRobustError):
    """A backend of the local relation op was asked for and cannot run."""


class BackendWarning(UserWarning):
    """No fused backend of the local relation op can run, so a slower one does. Not an error: results agree."""


class StoreError(LrRobustError):
    """Results cannot be written or read, or belong to another run."""


class BaselineError(LrRobustError):
    """A baseline is damaged, or is of another comparison than the one asked for."""


#: Names that a message lists at most: libraries of models have thousands.
_MOST_NAMES = 40


class UnknownNameError(LrRobustError):
    """A name is not among the known ones; the message offers the nearest.

    Args:
        kind: what the name stands for, as in "model".
        name: what was asked for.
        known: every name that would have been accepted.
        otherwise: what may be given instead of a name.
    """

    def __init__(self, kind: str, name: str, known: Iterable[str], otherwise: str = "") -> None:
        known = sorted(set(known))
        spelled = {each.lower(): each for each in known}
        near = [spelled[each] for each in difflib.get_close_matches(name.lower(), spelled, n=3, cutoff=0.5)]
        more = f", and {len(known) - _MOST_NAMES} more" if len(known) > _MOST_NAMES else ""
        hint = f"did you mean {', '.join(near)}?" if near else f"known: {', '.join(known[:_MOST_NAMES])}{more}"
        if otherwise:
            hint += f"{'' if near else ';'} or give {otherwise}"
        super().__init__(f"unknown {kind} {name!r}: {hint}")
