"""Where a process computes, and with whom: by options, and by what torchrun puts into the environment."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

import torch

from lrrobust.errors import ConfigError
from lrrobust.evaluation.task_queue import Sharing
from lrrobust.mistakes import brief


def choose_device(name: str) -> torch.device:
    """The device of that name; "auto" is CUDA where there is some, else the CPU.

    Without a number, "cuda" is the first device, or the one of this process's turn where torchrun started several.
    """
    if name in ("auto", "cuda") and torch.cuda.is_available():
        return torch.device("cuda", _number(os.environ, "LOCAL_RANK", 0) % torch.cuda.device_count())
    if name == "auto":
        return torch.device("cpu")
    try:
        if name.split(":")[0] not in ("cpu", "cuda"):
            raise RuntimeError("only cpu and cuda are supported")
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = " ".join(str(error).split())[:150]
        others = "cpu or auto" if name.startswith("cuda") else "cpu, cuda or auto"
        raise ConfigError(f"--device {name!r} cannot be used here ({reason}): try {others}") from None
    return device


def choose_sharing(is_asked: bool, environ: Mapping[str, str]) -> Sharing | None:
    """How this process shares its runs with others: as torchrun has numbered them, or because it is asked to; else not.

    `LRROBUST_LEASE_S` in the environment replaces the seconds after which a silent process is taken for dead.

    Raises:
        ConfigError: the environment holds no numbers where it should.
    """
    world_size = _number(environ, "WORLD_SIZE", 1)
    if world_size == 1 and not is_asked:
        return None
    lease_s = _number(environ, "LRROBUST_LEASE_S", round(Sharing.lease_s))
    return Sharing(_number(environ, "RANK", 0), max(1, world_size), max(1, lease_s))


def _number(environ: Mapping[str, str], name: str, default: int) -> int:
    value = environ.get(name, str(default))
    if not re.fullmatch(r"[0-9]{1,9}", value):
        raise ConfigError(f"the environment variable {name} must be a number, found {brief(value)}: unset it, or correct it")
    return int(value)
