"""Where a number comes from: versions, commit, machine."""

from __future__ import annotations

import platform
import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lrrobust
from lrrobust.process_settings import count_cores

if TYPE_CHECKING:
    import torch

_PACKAGES = ("torch", "torchvision", "torchattacks", "numba", "numpy", "pandas", "pyarrow", "pillow", "timm")


def describe_environment(device: torch.device) -> dict[str, Any]:
    """JSON-ready record of the software and hardware that compute a result."""
    import torch

    return {
        "lrrobust": lrrobust.__version__,
        "commit": find_commit(),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "processor": describe_processor(),
        "device": f"cuda ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "versions": {name: _version(name) for name in _PACKAGES},
    }


#: What of a checkout decides results, beside the package.
_CODE = ("attacks_configs", "pyproject.toml")


@cache
def find_commit() -> str | None:
    """Commit of the checkout this package runs from, with "-dirty" when code or attacks differ; None when installed.

    Asked once: what this process runs is what it loaded then.
    """
    package = Path(lrrobust.__file__).parent
    root = package.parent
    if not (root / ".git").exists():
        return None
    try:
        git = ["git", "-C", str(root)]
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True)
        status = subprocess.run(
            [*git, "status", "--porcelain", "--", package.name, *_CODE], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return commit.stdout.strip() + ("-dirty" if status.stdout.strip() else "")


def describe_code() -> str:
    """Version and commit of this package, in words."""
    commit = find_commit()
    return f"lrrobust {lrrobust.__version__}" + (f", commit {name_commit(commit)}" if commit else "")


def name_commit(commit: str) -> str:
    """A commit as `find_commit` gives it, in words."""
    return commit.replace("-dirty", " with uncommitted changes")


def describe_processor() -> str:
    """Model name of the processor and the number of cores this process may use."""
    name = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    except OSError:
        pass
    return f"{name}, {count_cores()} cores"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
