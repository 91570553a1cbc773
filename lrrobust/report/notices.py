"""What readers of a run's numbers must know before they trust them."""

from __future__ import annotations

from lrrobust.results import Run

#: Part metadata that the engine writes only where something is wrong.
_WARNING_KEYS = ("randomised", "probabilities", "nonfinite_gradients")


def warnings_of(run: Run) -> list[str]:
    """What the engine noticed while it computed the run and readers of its numbers must know."""
    noticed = {key: part[key] for part in run.part_metadata.values() for key in _WARNING_KEYS if key in part}
    return [f"{key.replace('_', ' ')}: {text}" for key, text in sorted(noticed.items())]


def mixed_metadata(run: Run) -> dict[str, list[str]]:
    """The metadata in which the parts of a run differ, such as devices, with their values."""
    keys = {key for metadata in run.part_metadata.values() for key in metadata} - set(_WARNING_KEYS)
    values = {key: sorted({part.get(key, "unknown") for part in run.part_metadata.values()}) for key in keys}
    return {key: found for key, found in values.items() if len(found) > 1}
