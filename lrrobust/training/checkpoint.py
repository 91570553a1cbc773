"""Checkpoints: everything a training needs to go on, in one file that is whole or not there."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from lrrobust.errors import ConfigError, StoreError, WeightsError
from lrrobust.tensor_file import load_tensors


def read_checkpoint(path: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """The state a training of this identity left at `path`, on the CPU; None where there is no file.

    Raises:
        WeightsError: the file is damaged.
        ConfigError: the file belongs to another training.
    """
    if not path.exists():
        return None
    try:
        state = load_tensors(path)
        # Versions before this one said less.
        found = {**identity, **state["identity"]}
    except Exception as error:  # torch raises many types on damaged files
        raise WeightsError(
            f"the checkpoint {path} cannot be read ({type(error).__name__}): delete it to start again, or choose another --out"
        ) from None
    if found != identity:
        raise ConfigError(
            f"{path} belongs to another training ({', '.join(_differences(found, identity))} differ): choose another --out, or "
            "delete it to start again"
        )
    return state


def write_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Writes a state with its "identity" atomically.

    Raises:
        StoreError: there is no room, or no such folder can be made; the file of before is kept.
    """
    # One name: what a killed process left is overwritten.
    temporary = path.with_name(".checkpoint.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            torch.save(state, file)
            file.flush()
            # Else a power cut may leave the name without the content.
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        with suppress(OSError):  # as where a file takes the folder's place
            temporary.unlink()
        # torch raises an error of its own where the disk is full.
        reason = error.__context__ if isinstance(error.__context__, OSError) else error
        kept = "the last checkpoint is kept, " if os.path.exists(path) else ""
        raise StoreError(f"cannot write {path}: {reason}; {kept}make room and run the same command again") from None


def _differences(before: Any, now: Any, name: str = "") -> list[str]:
    """Names of what differs, such as `recipe.learning_rate`."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = [key for key in {**now, **before} if before.get(key) != now.get(key)]
        return [each for key in keys for each in _differences(before.get(key), now.get(key), f"{name}.{key}".removeprefix("."))]
    return [name.replace("images_sha256", "images").replace("initial_weights", "initial weights")]
